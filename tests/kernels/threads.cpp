// The pool of threads, and the kernels that it runs, under the thread sanitizer. A program, since Python and torch are
// not compiled for it; `make sanitize` builds and runs it.
//
// What tasks write is plain memory, so that the sanitizer sees whether the pool orders it. Exits with 1 where a result is
// wrong, and as the sanitizer says where there is a race.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "thread_pool.h"

namespace tenfold {
namespace {

constexpr int kThreads = 6;
using Floats = std::vector<float>;

void check(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "threads.cpp: %s\n", what.c_str());
  std::exit(1);
}

// The pool.

// How often each task ran, and how many tasks each thread took.
struct Counts {
  std::vector<int> tasks, threads;
};

void count_tasks(int64_t tasks, int most_threads) {
  Counts counts = {std::vector<int>(static_cast<size_t>(tasks)), std::vector<int>(kThreads)};
  Counts* context = &counts;
  run_tasks(
      tasks, most_threads,
      [](const void* context, int64_t task, int thread) noexcept {
        Counts& counts = **static_cast<Counts* const*>(context);
        ++counts.tasks[static_cast<size_t>(task)];
        ++counts.threads[static_cast<size_t>(thread)];
      },
      &context);
  check(std::all_of(counts.tasks.begin(), counts.tasks.end(), [](int n) { return n == 1; }),
        "a task did not run once");
  check(std::accumulate(counts.threads.begin() + std::min(most_threads, kThreads), counts.threads.end(), 0) ==
            0,
        "a thread had too high a number");
}

// Jobs of all sizes, `delay` apart: workers spin, or have gone to sleep.
void jobs_in_a_row(int rounds, std::chrono::milliseconds delay) {
  for (int round = 0; round < rounds; ++round) {
    for (int threads = 1; threads <= kThreads; ++threads) {
      set_threads(threads);
      for (const int most_threads : {1, 2, kMostThreads}) {
        for (const int64_t tasks : {0, 1, 2, 5, 300}) {
          if (delay.count()) std::this_thread::sleep_for(delay);
          count_tasks(tasks, most_threads);
        }
      }
    }
  }
}

// Jobs of several callers, who also change the number of threads.
void callers_at_a_time() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller] {
      for (int i = 0; i < 2000; ++i) {
        if (i % 7 == caller) set_threads(1 + i % kThreads);
        check(threads() >= 1 && threads() <= kThreads, "the number of threads is none that was set");
        count_tasks(i % 40, 1 + i % (kThreads + 1));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void a_forked_child() {
  set_threads(kThreads);
  count_tasks(300, kMostThreads);
  const pid_t child = fork();
  if (child == 0) {
    for (int i = 0; i < 100; ++i) count_tasks(300, kMostThreads);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(status == 0, "a forked child failed");
}

// The kernels.

Floats normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  Floats numbers(static_cast<size_t>(count));
  for (float& number : numbers) number = distribution(generator);
  return numbers;
}

Rows rows_of(Floats& numbers, int64_t cols) {
  return {numbers.data(), DType::f32, static_cast<int64_t>(numbers.size()) / cols, cols, cols};
}

// A result has the same bits on one thread and on several.
template <class F>
void compare(const std::string& kernel, const F& result) {
  set_threads(1);
  const Floats expected = result();
  for (const int count : {2, 4}) {
    set_threads(count);
    check(result() == expected, std::string(kernels().name) + ": " + kernel + " depends on the threads");
  }
}

struct Weight {
  Weight(Format format, int64_t rows, int64_t cols, unsigned seed)
      : bytes(allocate(static_cast<size_t>(packed_bytes(format, rows, cols)))),
        matrix{bytes.get(), format, rows, cols} {
    Floats numbers = normal(rows * cols, seed);
    check(kernels().pack({rows_of(numbers, cols), nullptr, bytes.get(), block_bytes(format, cols), format}),
          "weights were not packed");
  }

  Memory bytes;
  PackedMatrix matrix;
};

Floats multiply(Format format, int64_t tokens) {
  Floats x = normal(tokens * 64, 1), first(static_cast<size_t>(tokens * 500)),
         second(static_cast<size_t>(tokens * 33));
  const Weight weights[] = {{format, 500, 64, 2}, {format, 33, 64, 3}};
  const PackedMatrix matrices[] = {weights[0].matrix, weights[1].matrix};
  const Rows outputs[] = {rows_of(first, 500), rows_of(second, 33)};
  Product op = {rows_of(x, 64), matrices, outputs, 2, nullptr};
  op.scratch = scratch(kernels().product_scratch(op));
  kernels().product(op);
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

Floats run_experts(Format format, int64_t tokens) {
  constexpr int64_t kExperts = 8, kHidden = 64, kWidth = 96, kChoices = 3;
  const auto each = static_cast<size_t>(expert_bytes(format, kHidden, kWidth));
  const Memory bytes = allocate(kExperts * each);
  std::vector<const uint8_t*> experts;
  for (size_t e = 0; e < kExperts; ++e) {
    uint8_t* at = bytes.get() + e * each;
    const int64_t block = block_bytes(format, kHidden);
    Floats gate = normal(kWidth * kHidden, 1), up = normal(kWidth * kHidden, 2),
           down = normal(kWidth * kHidden, 3);
    kernels().pack({rows_of(gate, kHidden), nullptr, at, 2 * block, format});
    kernels().pack({rows_of(up, kHidden), nullptr, at + block, 2 * block, format});
    kernels().pack({rows_of(down, kWidth), nullptr, at + 2 * packed_bytes(format, kWidth, kHidden),
                    block_bytes(format, kWidth), format});
    experts.push_back(at);
  }
  std::vector<int32_t> chosen;
  for (int64_t t = 0; t < tokens; ++t) {
    for (const int64_t choice : {t % 3, 3 + t % 2, 5 + t % 3}) chosen.push_back(static_cast<int32_t>(choice));
  }
  Floats x = normal(tokens * kHidden, 4), out(x.size()), weights = normal(tokens * kChoices, 5);
  ExpertLayer op = {rows_of(x, kHidden), rows_of(out, kHidden), experts.data(), format,    kExperts, kWidth,
                    chosen.data(),       weights.data(),        kChoices,       threads(), nullptr};
  op.scratch = scratch(kernels().expert_layer_scratch(op));
  kernels().expert_layer(op);
  return out;
}

// Two sequences, whose states are also saved after the last tokens of the first.
Floats run_delta_net() {
  constexpr int64_t kHeads = 3, kShared = 2, kKey = 32, kValue = 48, kWidth = 4, kTokens = 41, kSlots = 4;
  constexpr int64_t kValues = kShared * kValue, kChannels = 2 * kKey + kValues;
  const int64_t bounds[] = {0, 40, kTokens}, slots[] = {2, 0}, past[] = {0, 0}, saved[] = {2, 0},
                save[] = {1, 3};
  const int64_t* saves[] = {save, nullptr};
  Floats qkvz = normal(kTokens * kHeads * (kChannels + kValues), 1),
         ba = normal(kTokens * kHeads * 2 * kShared, 2);
  Floats out(kTokens * kHeads * kValues), conv_state = normal(kSlots * kHeads * kChannels * (kWidth - 1), 3),
                                          state = normal(kSlots * kHeads * kValues * kKey, 4);
  const Floats conv_weight = normal(kHeads * kWidth * kChannels, 5), rate(kHeads * kShared, -1.0f),
               dt_bias = normal(kHeads * kShared, 6), norm_weight = normal(kValue, 7);
  DeltaNet op = {};
  op.qkvz = rows_of(qkvz, kHeads * (kChannels + kValues)), op.ba = rows_of(ba, kHeads * 2 * kShared);
  op.out = rows_of(out, kHeads * kValues);
  op.sequences = {2, bounds, slots, past, nullptr, saved, saves};
  op.key_heads = kHeads, op.shared = kShared, op.key_dim = kKey, op.value_dim = kValue,
  op.conv_width = kWidth;
  op.conv_weight = conv_weight.data(), op.rate = rate.data(), op.dt_bias = dt_bias.data();
  op.norm_weight = norm_weight.data(), op.eps = 1e-6f;
  op.conv_state = conv_state.data(), op.state = state.data();
  op.threads = threads();
  op.scratch = scratch(kernels().delta_net_scratch(op));
  kernels().delta_net(op);
  out.insert(out.end(), conv_state.begin(), conv_state.end());
  out.insert(out.end(), state.begin(), state.end());
  return out;
}

// Keys and values of two sequences in pages of their own.
class Cache {
 public:
  static constexpr int64_t kHeads = 2, kDim = 32, kPage = 32, kPages = 12;  // pages of each

  explicit Cache(CacheType type)
      : keys_(2 * kPages * kHeads * kPage * kDim),
        values_(keys_.size()),
        key_scales_(2 * kPages * kHeads * kPage),
        value_scales_(key_scales_.size()),
        view{keys_.data(), values_.data(), key_scales_.data(), value_scales_.data(), type, kHeads, 2 * kPages,
             kDim,         kPage} {}

  // Of queries of 4 heads for so many new tokens of either.
  Floats attend(int64_t past, int64_t tokens) {
    std::vector<int32_t> first(kPages), second(kPages);
    std::iota(first.begin(), first.end(), 0), std::iota(second.begin(), second.end(), kPages);
    const int32_t* pages[] = {first.data(), second.data()};
    const int64_t bounds[] = {0, tokens, 2 * tokens}, both[] = {past, past};
    Floats q = normal(2 * tokens * 8 * kDim, 1), k = normal(2 * tokens * kHeads * kDim, 2),
           v = normal(2 * tokens * kHeads * kDim, 3), out(static_cast<size_t>(2 * tokens * 4 * kDim));
    const Floats norm = normal(kDim, 4), cos = normal(2 * tokens * kDim / 4, 5),
                 sin = normal(2 * tokens * kDim / 4, 6);
    Attention op = {};
    op.q = rows_of(q, 8 * kDim), op.k = rows_of(k, kHeads * kDim), op.v = rows_of(v, kHeads * kDim);
    op.out = rows_of(out, 4 * kDim), op.heads = 4, op.gated = true;
    op.sequences = {2, bounds, nullptr, both, pages, nullptr, nullptr}, op.cache = view;
    op.q_norm = op.k_norm = norm.data(), op.eps = 1e-6f;
    op.cos = cos.data(), op.sin = sin.data(), op.rotated = kDim / 2;
    op.threads = threads();
    op.scratch = scratch(kernels().attention_scratch(op));
    kernels().attention(op);
    return out;
  }

 private:
  Floats keys_, values_, key_scales_, value_scales_;  // large enough for any type
  PagedCache view;
};

// A prefill, whose walks are many, then a decode step, whose few walks are spread over threads block by block.
Floats run_attention(CacheType type) {
  Cache cache(type);
  Floats out = cache.attend(0, 350);
  const Floats next = cache.attend(350, 1);
  out.insert(out.end(), next.begin(), next.end());
  return out;
}

Floats normalize() {
  Floats x = normal(100 * 64, 1), delta = normal(100 * 64, 2), weight = normal(64, 3), out(x.size());
  const Rows added = rows_of(delta, 64);
  kernels().rms_norm({rows_of(x, 64), rows_of(out, 64), &added, weight.data(), 1e-6f});
  out.insert(out.end(), x.begin(), x.end());
  return out;
}

Floats route() {
  Floats logits = normal(100 * 30, 1), gate = normal(100, 2), weights(100 * 5);
  std::vector<int32_t> chosen(100 * 5);
  const Rows shared = rows_of(gate, 1);
  kernels().route({rows_of(logits, 30), &shared, 4, 1, true, chosen.data(), weights.data()});
  weights.insert(weights.end(), chosen.begin(), chosen.end());
  return weights;
}

Floats swiglu() {
  Floats gate = normal(100 * 64, 1), up = normal(100 * 64, 2), out(gate.size());
  kernels().swiglu({rows_of(gate, 64), rows_of(up, 64), rows_of(out, 64)});
  return out;
}

void all_kernels() {
  for (const Format format : {Format::bf16, Format::int8, Format::int4}) {
    for (const int64_t tokens : {1, 50}) {
      compare("product", [&] { return multiply(format, tokens); });
      compare("expert_layer", [&] { return run_experts(format, tokens); });
    }
  }
  for (const CacheType type : {CacheType::f32, CacheType::bf16, CacheType::f16, CacheType::int8}) {
    compare("attention", [&] { return run_attention(type); });
  }
  compare("delta_net", run_delta_net);
  compare("rms_norm", normalize);
  compare("route", route);
  compare("swiglu", swiglu);
}

}  // namespace
}  // namespace tenfold

// Or it would end the forked child, whose pool starts threads of its own.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "die_after_fork=0";
}

int main() {
  using namespace tenfold;
  jobs_in_a_row(20, std::chrono::milliseconds(0));
  jobs_in_a_row(1, std::chrono::milliseconds(10));
  callers_at_a_time();
  a_forked_child();
  for (const KernelTable* table : available_tables()) {
    select_table(table->name);
    all_kernels();
    std::printf("%s: no kernel depends on the number of threads\n", table->name);
  }
  // The process ends while workers spin.
}
