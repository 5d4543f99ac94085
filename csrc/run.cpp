#include "run.h"

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "dispatch.h"
#include "memory.h"
#include "packed.h"
#include "thread_pool.h"

namespace tenfold {
namespace {

struct Work {
  std::string kernel;
  double bytes = 0, operations = 0;
};

std::atomic<bool> profiling{false};
std::mutex profile_lock;
std::map<std::string, Use> profile;

void note(const Work& work, double seconds) {
  const std::lock_guard lock(profile_lock);
  Use& use = profile.try_emplace(work.kernel, Use{work.kernel, 0, 0, 0, 0}).first->second;
  ++use.calls;
  use.seconds += seconds, use.bytes += work.bytes, use.operations += work.operations;
}

// Runs a kernel; its work is asked for only where somebody wants to know.
template <class F, class G>
void timed(const F& kernel, const G& work) {
  if (!profiling.load(std::memory_order_relaxed)) return kernel();
  const auto start = std::chrono::steady_clock::now();
  kernel();
  note(work(), std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

double number(int64_t x) { return static_cast<double>(x); }

Work work_of(const Product& op) {
  Work work = {std::string("linear ") + name_of(op.weights[0].format)};
  for (int64_t i = 0; i < op.count; ++i) {
    const PackedMatrix& weight = op.weights[i];
    work.bytes += number(packed_bytes(weight.format, weight.rows, weight.cols));
    work.operations += 2 * number(op.x.rows) * number(weight.rows) * number(weight.cols);
  }
  return work;
}

Work work_of(const ExpertLayer& op) {
  std::vector<bool> touched(static_cast<size_t>(op.count));
  int64_t experts = 0;
  for (int64_t i = 0; i < op.x.rows * op.choices; ++i) {
    const auto expert = static_cast<size_t>(op.chosen[i]);
    experts += !touched[expert];
    touched[expert] = true;
  }
  return {std::string("experts ") + name_of(op.format),
          number(experts * expert_bytes(op.format, op.x.cols, op.width)),
          6 * number(op.x.rows * op.choices) * number(op.x.cols) * number(op.width)};
}

// States are read and written once a call. Of an element a token reads the old value twice (for k and q), scales it and
// adds to it: seven operations.
Work work_of(const DeltaNet& op) {
  const double state = number(op.key_heads * op.shared * op.key_dim * op.value_dim);
  return {"gated delta net", 2 * sizeof(float) * state * number(op.sequences.count),
          7 * state * number(op.qkvz.rows)};
}

const char* name_of(CacheType type) {
  switch (type) {
    case CacheType::f32: return "fp32";
    case CacheType::bf16: return "bf16";
    case CacheType::f16: return "fp16";
    case CacheType::int8: return "int8";
  }
  return "";
}

Work work_of(const Attention& op) {
  double held = 0, pairs = 0;  // tokens in the cache; pairs of a new token and one that it sees
  for (int64_t n = 0; n < op.sequences.count; ++n) {
    const double past = number(op.sequences.past[n]);
    const double tokens = number(op.sequences.bounds[n + 1] - op.sequences.bounds[n]);
    held += past + tokens;
    pairs += tokens * past + tokens * (tokens + 1) / 2;
  }
  const double element = op.cache.type == CacheType::f32 ? 4 : op.cache.type == CacheType::int8 ? 1 : 2;
  return {std::string("attention ") + name_of(op.cache.type),
          2 * held * number(op.cache.kv_heads * op.cache.dim) * element,
          4 * pairs * number(op.heads * op.cache.dim)};
}

}  // namespace

void run(Product op) {
  op.scratch = scratch(kernels().product_scratch(op));
  timed([&] { kernels().product(op); }, [&] { return work_of(op); });
}

void run(ExpertLayer op) {
  op.threads = threads();
  op.scratch = scratch(kernels().expert_layer_scratch(op));
  timed([&] { kernels().expert_layer(op); }, [&] { return work_of(op); });
}

void run(DeltaNet op) {
  op.threads = threads();
  op.scratch = scratch(kernels().delta_net_scratch(op));
  timed([&] { kernels().delta_net(op); }, [&] { return work_of(op); });
}

void run(KeysAndValues op) {
  op.threads = threads();
  timed([&] { kernels().remember(op); }, [] { return Work{"keys and values"}; });
}

void run(Attention op) {
  op.threads = threads();
  op.scratch = scratch(kernels().attention_scratch(op));
  timed([&] { kernels().attention(op); }, [&] { return work_of(op); });
}

void run(const RmsNorm& op) {
  timed([&] { kernels().rms_norm(op); }, [] { return Work{"norm"}; });
}

void run(const Router& op) {
  timed([&] { kernels().route(op); }, [] { return Work{"route"}; });
}

void run(const SwiGlu& op) {
  timed([&] { kernels().swiglu(op); }, [] { return Work{"swiglu"}; });
}

void start_profile() {
  const std::lock_guard lock(profile_lock);
  profile.clear();
  profiling = true;
}

std::vector<Use> stop_profile() {
  const std::lock_guard lock(profile_lock);
  profiling = false;
  std::vector<Use> uses;
  for (const auto& [kernel, use] : profile) uses.push_back(use);
  return uses;
}

}  // namespace tenfold
