// Norms, the router's choice, and SwiGLU.

#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kTaskTokens = 16;

float* row(const Rows& rows, int64_t i) { return static_cast<float*>(rows.data) + i * rows.stride; }

// run(token) for every token, some at a time.
template <class F>
void for_tokens(int64_t tokens, const F& run) {
  parallel_for((tokens + kTaskTokens - 1) / kTaskTokens, [&](int64_t task, int) {
    const int64_t end = (task + 1) * kTaskTokens;
    for (int64_t t = task * kTaskTokens; t < end && t < tokens; ++t) run(t);
  });
}

void add(float* x, const float* delta, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) + load(delta + i));
}

// Four sums hide the latency of an addition.
float mean_square(const float* x, int64_t count) {
  F32 sums[4] = {};
  for (int64_t i = 0; i < count; i += 4 * kLanes) {
    for (int j = 0; j < 4 && i + j * kLanes < count; ++j) {
      const F32 xi = load(x + i + j * kLanes);
      sums[j] = fma(xi, xi, sums[j]);
    }
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(count);
}

// Moves down what is smaller than the expert, from the free place on, and puts it there. NaN stays behind.
void insert(const float* logits, int32_t expert, int32_t* chosen, int64_t place) {
  for (; place > 0 && logits[expert] > logits[chosen[place - 1]]; --place) chosen[place] = chosen[place - 1];
  chosen[place] = expert;
}

void choose(const float* logits, int64_t experts, int32_t* chosen, int64_t choices) {
  for (int32_t e = 0; e < experts; ++e) {
    if (e < choices) {
      insert(logits, e, chosen, e);
    } else if (logits[e] > logits[chosen[choices - 1]]) {
      insert(logits, e, chosen, choices - 1);
    }
  }
}

// exp(x - most) of kLanes values of which the first `count` exist; the others count as minus infinity.
F32 exp_below(const float* x, int64_t count, F32 most) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? x[i] : -__builtin_inff();
  return exp(load(lanes) - most);
}

float sum_of_exp(const float* x, int64_t count, float most) {
  F32 total = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total = total + exp(load(x + i) - splat(most));
  if (i < count) total = total + exp_below(x + i, count - i, splat(most));
  return sum(total);
}

void weigh(const float* logits, int64_t experts, const int32_t* chosen, int64_t choices, bool normalize,
           float* weights) {
  const float most = logits[chosen[0]];
  const float all = sum_of_exp(logits, experts, most);
  float total = 0;
  for (int64_t j = 0; j < choices; ++j) {
    weights[j] = __builtin_expf(logits[chosen[j]] - most) / all;
    total += weights[j];
  }
  for (int64_t j = 0; normalize && j < choices; ++j) weights[j] /= total;
}

}  // namespace

void rms_norm(const RmsNorm& norm) noexcept {
  const int64_t count = norm.x.cols;
  for_tokens(norm.x.rows, [&](int64_t t) {
    float *x = row(norm.x, t), *out = row(norm.out, t);
    if (norm.delta) add(x, row(*norm.delta, t), count);
    const F32 inverse = splat(1.0f / __builtin_sqrtf(mean_square(x, count) + norm.eps));
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(x + i) * inverse * load(norm.weight + i));
  });
}

void route(const Router& router) noexcept {
  const int64_t places = router.choices + router.shared;
  for_tokens(router.logits.rows, [&](int64_t t) {
    const float* logits = row(router.logits, t);
    int32_t* chosen = router.chosen + t * places;
    float* weights = router.weights + t * places;
    choose(logits, router.logits.cols, chosen, router.choices);
    weigh(logits, router.logits.cols, chosen, router.choices, router.normalize, weights);
    for (int64_t i = 0; i < router.shared; ++i) {
      chosen[router.choices + i] = static_cast<int32_t>(router.logits.cols + i);
      weights[router.choices + i] = 1.0f / (1.0f + __builtin_expf(-*row(*router.shared_gate, t)));
    }
  });
}

void swiglu(const SwiGlu& op) noexcept {
  for_tokens(op.out.rows, [&](int64_t t) {
    const float *gate = row(op.gate, t), *up = row(op.up, t);
    float* out = row(op.out, t);
    for (int64_t i = 0; i < op.out.cols; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  });
}

}  // namespace tenfold::TENFOLD_ISA
