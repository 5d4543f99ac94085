// Gated DeltaNet between its projections, token by token.
//
// Each task is one key head of one sequence. It goes through the tokens in blocks: conv, norms and gates of a
// block, then kLanes rows of the state at a time, which stay in the first-level cache while the block's
// tokens pass over them. Every token is computed by the same operations in the same order wherever blocks,
// calls and threads begin, so that a prefill and a decoding give the same bits.

#include "scratch.h"
#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kBlockTokens = 16;
constexpr float kNormEps = 1e-6f;  // of the L2 norms

int64_t channels(const DeltaNet& layer) { return 2 * layer.key_dim + layer.shared * layer.value_dim; }

const float* row(const Rows& rows, int64_t i) {
  return static_cast<const float*>(rows.data) + i * rows.stride;
}

// One thread's intermediate results of a block.
struct Work {
  Work(const DeltaNet& layer, Scratch& memory) {
    before = memory.take<float>((kMostConvWidth - 1) * channels(layer));
    mixed = memory.take<float>(kBlockTokens * channels(layer));
    decay = memory.take<float>(kBlockTokens * layer.shared);
    beta = memory.take<float>(kBlockTokens * layer.shared);
    overlap = memory.take<float>(kBlockTokens);
  }

  float* before;        // the W - 1 inputs before the first token
  float* mixed;         // the conv's output: q, k, and v, which makes room for the rule's output
  float *decay, *beta;  // of each token's value heads
  float* overlap;       // k . q
};

// One key head of one sequence.
struct Head {
  const DeltaNet& layer;
  Work& work;
  int64_t head, slot, first, tokens;
  const int64_t* saves;  // the slots that the states after the last tokens go to besides
  int64_t unsaved;       // how many tokens come before those

  const float* input(int64_t token) const {
    const int64_t group = channels(layer) + layer.shared * layer.value_dim;
    return row(layer.qkvz, first + token) + head * group;
  }
  // q, k and v as the conv reads them; tokens before the first come from its state.
  const float* taps(int64_t token) const {
    if (token >= 0) return input(token);
    return work.before + (layer.conv_width - 1 + token) * channels(layer);
  }
  float* mixed(int64_t token) const { return work.mixed + token * channels(layer); }
  float* state(int64_t slot, int64_t shared) const {
    const int64_t value_heads = layer.key_heads * layer.shared;
    return layer.state +
           (slot * value_heads + head * layer.shared + shared) * layer.value_dim * layer.key_dim;
  }
};

// move(state, at, count) for the runs of channels whose conv states are neighbours: this head's q, k and v.
template <class F>
void for_conv_runs(const Head& h, int64_t slot, const F& move) {
  const int64_t taps = h.layer.conv_width - 1, key = h.layer.key_dim;
  const int64_t keys = h.layer.key_heads * key, values = h.layer.shared * h.layer.value_dim;
  float* state = h.layer.conv_state + slot * (2 * keys + h.layer.key_heads * values) * taps;
  move(state + h.head * key * taps, 0, key);
  move(state + (keys + h.head * key) * taps, key, key);
  move(state + (2 * keys + h.head * values) * taps, 2 * key, values);
}

void load_conv_state(const Head& h) {
  const int64_t taps = h.layer.conv_width - 1, stride = channels(h.layer);
  for_conv_runs(h, h.slot, [&](const float* state, int64_t at, int64_t count) {
    for (int64_t j = 0; j < taps; ++j) {
      float* to = h.work.before + j * stride + at;
      for (int64_t c = 0; c < count; ++c) to[c] = state[c * taps + j];
    }
  });
}

// As it is after so many tokens.
void store_conv_state(const Head& h, int64_t slot, int64_t tokens) {
  const int64_t taps = h.layer.conv_width - 1;
  for_conv_runs(h, slot, [&](float* state, int64_t at, int64_t count) {
    for (int64_t j = 0; j < taps; ++j) {
      const float* from = h.taps(tokens - taps + j) + at;
      for (int64_t c = 0; c < count; ++c) state[c * taps + j] = from[c];
    }
  });
}

// Channel by channel: its weights and the inputs that are read again stay in registers.
template <int kWidth>
void convolve_width(const Head& h, int64_t begin, int64_t count) {
  const int64_t stride = channels(h.layer);
  const float* weights = h.layer.conv_weight + h.head * kWidth * stride;
  const float* inputs[kBlockTokens + kWidth - 1];
  for (int64_t i = 0; i < count + kWidth - 1; ++i) inputs[i] = h.taps(begin + i - (kWidth - 1));
  for (int64_t c = 0; c < stride; c += kLanes) {
    F32 weight[kWidth], x[kWidth];
    unrolled<kWidth>([&](auto j) TENFOLD_BODY { weight[j] = load(weights + j * stride + c); });
    unrolled<kWidth - 1>([&](auto j) TENFOLD_BODY { x[j + 1] = load(inputs[j] + c); });
    for (int64_t t = 0; t < count; ++t) {
      unrolled<kWidth - 1>([&](auto j) TENFOLD_BODY { x[j] = x[j + 1]; });
      x[kWidth - 1] = load(inputs[t + kWidth - 1] + c);
      F32 y = weight[0] * x[0];
      unrolled<kWidth - 1>([&](auto j) TENFOLD_BODY { y = fma(weight[j + 1], x[j + 1], y); });
      store(h.mixed(t) + c, silu(y));
    }
  }
}

template <int kWidth = kMostConvWidth>
void convolve(const Head& h, int64_t begin, int64_t count) {
  if constexpr (kWidth > 0) {
    if (h.layer.conv_width == kWidth) return convolve_width<kWidth>(h, begin, count);
    convolve<kWidth - 1>(h, begin, count);
  }
}

float dot(const float* a, const float* b, int64_t count) {
  F32 total = splat(0);
  for (int64_t i = 0; i < count; i += kLanes) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}

void scale(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) * splat(factor));
}

void normalize(const Head& h, int64_t count) {
  const int64_t dim = h.layer.key_dim;
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  for (int64_t t = 0; t < count; ++t) {
    float *q = h.mixed(t), *k = q + dim;
    scale(q, dim, root / __builtin_sqrtf(dot(q, q, dim) + kNormEps));
    scale(k, dim, 1.0f / __builtin_sqrtf(dot(k, k, dim) + kNormEps));
    h.work.overlap[t] = dot(k, q, dim);
  }
}

float softplus(float x) { return x > 20.0f ? x : __builtin_log1pf(__builtin_expf(x)); }

void gates(const Head& h, int64_t begin, int64_t count) {
  const int64_t shared = h.layer.shared;
  for (int64_t t = 0; t < count; ++t) {
    const float* b = row(h.layer.ba, h.first + begin + t) + h.head * 2 * shared;
    for (int64_t r = 0; r < shared; ++r) {
      const int64_t head = h.head * shared + r;
      const float step = softplus(b[shared + r] + h.layer.dt_bias[head]);
      h.work.decay[t * shared + r] = __builtin_expf(h.layer.rate[head] * step);
      h.work.beta[t * shared + r] = 1.0f / (1.0f + __builtin_expf(-b[r]));
    }
  }
}

struct Write {
  F32 decay, d;
  const float* k;
};
struct Read {
  const float *q, *k;
  F32 by_key, by_query;

  TENFOLD_INLINE void of(const float* mixed, int64_t dim) { q = mixed, k = mixed + dim; }
};

// One sweep over kLanes rows of S: S <- decay S + d k^T of one token if it `kWrites`, then S k and S q of the next if it
// `kReads`. Half of the rows at a time, so that all sums fit the registers.
template <bool kWrites, bool kReads>
TENFOLD_INLINE void sweep(float* state, int64_t dim, const Write& write, Read& read) {
  constexpr int kHalf = kLanes / 2;
  alignas(64) float d[kLanes];
  if constexpr (kWrites) store(d, write.d);
  F32 both[2];
  unrolled<2>([&](auto half) TENFOLD_BODY {
    float* rows = state + half * kHalf * dim;
    F32 sums[kLanes] = {}, each[kHalf];
    if constexpr (kWrites) {
      unrolled<kHalf>([&](auto row) TENFOLD_BODY { each[row] = splat(d[half * kHalf + row]); });
    }
    for (int64_t i = 0; i < dim; i += kLanes) {
      const F32 written = kWrites ? load(write.k + i) : splat(0);
      const F32 k = kReads ? load(read.k + i) : splat(0), q = kReads ? load(read.q + i) : splat(0);
      unrolled<kHalf>([&](auto row) TENFOLD_BODY {
        F32 s = load(rows + row * dim + i);
        if constexpr (kWrites) store(rows + row * dim + i, s = fma(each[row], written, write.decay * s));
        if constexpr (kReads)
          sums[row] = fma(s, k, sums[row]), sums[kHalf + row] = fma(s, q, sums[kHalf + row]);
      });
    }
    if constexpr (kReads) both[half] = sum_each(sums);
  });
  if constexpr (kReads)
    read.by_key = low_halves(both[0], both[1]), read.by_query = high_halves(both[0], both[1]);
}

// Decoding reads a state from memory: the rows after these, which may be the next value head's, are on their way while
// these are computed.
void fetch_state(const float* state, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(state + i);
}

// kLanes rows of the state after a token, to the slot where it is saved.
void save_rows(const Head& h, int64_t token, int64_t shared, int64_t v) {
  const int64_t slot = h.saves[token - h.unsaved], dim = h.layer.key_dim;
  if (slot == h.slot) return;
  memcpy(h.state(slot, shared) + v * dim, h.state(h.slot, shared) + v * dim,
         static_cast<size_t>(kLanes * dim) * sizeof(float));
}

// kTiles times kLanes rows of a value head's state, from row `v` on, over a block: outputs take the place of the values.
// Two tiles in turns: while the sums of one are added up across lanes, the other is gone through.
template <int kTiles>
void recur_rows(const Head& h, int64_t shared, int64_t v, int64_t begin, int64_t count) {
  const int64_t dim = h.layer.key_dim, value_dim = h.layer.value_dim;
  float* state = h.state(h.slot, shared) + v * dim;
  if (v + kTiles * kLanes < value_dim || shared + 1 < h.layer.shared) {
    fetch_state(state + kTiles * kLanes * dim, kTiles * kLanes * dim);
  }
  Read reads[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    reads[i].of(h.mixed(0), dim);
    sweep<false, true>(state + i * kLanes * dim, dim, Write(), reads[i]);
  }
  for (int64_t t = 0; t < count; ++t) {
    const F32 decay = splat(h.work.decay[t * h.layer.shared + shared]);
    const F32 beta = splat(h.work.beta[t * h.layer.shared + shared]);
    for (int i = 0; i < kTiles; ++i) {
      float* rows = state + i * kLanes * dim;
      float* value = h.mixed(t) + 2 * dim + shared * value_dim + v + i * kLanes;
      Read& read = reads[i];
      const F32 d = beta * (load(value) - decay * read.by_key);
      store(value, fma(splat(h.work.overlap[t]), d, decay * read.by_query));
      const Write write = {decay, d, read.k};
      if (t + 1 < count) {
        read.of(h.mixed(t + 1), dim);
        sweep<true, true>(rows, dim, write, read);
      } else {
        sweep<true, false>(rows, dim, write, read);
      }
      if (begin + t >= h.unsaved) save_rows(h, begin + t, shared, v + i * kLanes);
    }
  }
}

// One value head over a block.
void recur(const Head& h, int64_t shared, int64_t begin, int64_t count) {
  const int64_t rows = h.layer.value_dim;
  int64_t v = 0;
  if (count > 1) {
    for (; v + 2 * kLanes <= rows; v += 2 * kLanes) recur_rows<2>(h, shared, v, begin, count);
  }
  for (; v < rows; v += kLanes) recur_rows<1>(h, shared, v, begin, count);
}

void gated_norm(const Head& h, int64_t begin, int64_t count) {
  const int64_t dim = h.layer.value_dim, values = h.layer.shared * dim;
  for (int64_t t = 0; t < count; ++t) {
    const float *o = h.mixed(t) + 2 * h.layer.key_dim, *z = h.input(begin + t) + channels(h.layer);
    float* out = const_cast<float*>(row(h.layer.out, h.first + begin + t)) + h.head * values;
    for (int64_t r = 0; r < values; r += dim) {
      const float mean = dot(o + r, o + r, dim) / static_cast<float>(dim);
      const F32 inverse = splat(1.0f / __builtin_sqrtf(mean + h.layer.eps));
      for (int64_t i = 0; i < dim; i += kLanes) {
        const F32 normed = load(o + r + i) * inverse * load(h.layer.norm_weight + i);
        store(out + r + i, normed * silu(load(z + r + i)));
      }
    }
  }
}

void advance(const Head& h) {
  fetch_state(h.state(h.slot, 0), kLanes * h.layer.key_dim);
  load_conv_state(h);
  for (int64_t begin = 0; begin < h.tokens; begin += kBlockTokens) {
    const int64_t left = h.tokens - begin, count = left < kBlockTokens ? left : kBlockTokens;
    convolve(h, begin, count);
    normalize(h, count);
    gates(h, begin, count);
    for (int64_t r = 0; r < h.layer.shared; ++r) recur(h, r, begin, count);
    gated_norm(h, begin, count);
  }
  for (int64_t t = h.unsaved; t < h.tokens; ++t) store_conv_state(h, h.saves[t - h.unsaved], t + 1);
  store_conv_state(h, h.slot, h.tokens);
}

}  // namespace

size_t delta_net_scratch(const DeltaNet& layer) noexcept {
  Scratch memory(nullptr);
  for (int thread = 0; thread < layer.threads; ++thread) Work(layer, memory);
  return memory.used();
}

void delta_net(const DeltaNet& layer) noexcept {
  Scratch one(nullptr);
  Work(layer, one);
  parallel_for(
      layer.sequences.count * layer.key_heads,
      [&](int64_t task, int thread) {
        Scratch memory(static_cast<uint8_t*>(layer.scratch) + static_cast<size_t>(thread) * one.used());
        Work work(layer, memory);
        const Sequences& sequences = layer.sequences;
        const int64_t n = task / layer.key_heads, first = sequences.bounds[n];
        const int64_t tokens = sequences.bounds[n + 1] - first;
        advance({layer, work, task % layer.key_heads, sequences.slots[n], first, tokens, sequences.saves[n],
                 tokens - sequences.saved[n]});
      },
      layer.threads);
}

}  // namespace tenfold::TENFOLD_ISA
