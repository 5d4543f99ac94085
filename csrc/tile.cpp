#include "tile.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kVectors = kBlockRows / kLanes;  // that hold a value for each row of a block
constexpr int kVectorBytes = 4 * kLanes;

// Sums that registers hold; those of a group share them with weights and inputs on their way.
constexpr int kMostSums = kRegisters == 32 ? 24 : 12;
constexpr int kMostGroupSums = kRegisters == 32 ? 16 : 12;

// How many of a block's vectors a tile takes at once: as many as leave a register for each of its sums.
constexpr int tile_vectors(int tokens, int most) {
  int vectors = kVectors;
  while (vectors > 1 && vectors * tokens > most) vectors /= 2;
  return vectors;
}

template <int V, int T>
using Sums = F32[V][T];

// The same, in memory: the first-level cache holds them between the groups, whose own sums take the registers.
struct SumsInMemory {
  float* y;  // [tokens, rows of a block]
};

template <int V, int T>
TENFOLD_INLINE void add(Sums<V, T>& y, int v, int t, F32 a, F32 b) {
  y[v][t] = fma(a, b, y[v][t]);
}

TENFOLD_INLINE void add(SumsInMemory& sums, int v, int t, F32 a, F32 b) {
  float* y = sums.y + t * kBlockRows + v * kLanes;
  store(y, fma(a, b, load(y)));
}

struct QuantizedInput {
  int8_t x[kGroup];
  float scale;
  int32_t bias;
};

// Of bf16 weights.
struct PlainInput {
  PairInput x[kGroup];
};

void prepare(const float* from, QuantizedInput& to) {
  constexpr uint32_t kLargestFinite = 0x7f7fffff;
  uint32_t magnitude = 0;
  for (int i = 0; i < kGroup; i += 2 * kLanes) {
    const uint32_t largest = largest_magnitude(load(from + i), load(from + i + kLanes));
    magnitude = largest > magnitude ? largest : magnitude;
  }
  // A group below 1e-30 counts as zero, since 127 over it would overflow; one that is not finite gives NaN.
  const float largest = read<float>(&magnitude);
  const bool finite = magnitude <= kLargestFinite;
  const float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < kGroup; i += kLanes) store_int8(to.x + i, load(from + i) * splat(inverse));
  to.scale = finite ? (inverse != 0.0f ? largest / 127.0f : 0.0f) : __builtin_nanf("");
}

void add_bias(QuantizedInput& input) { input.bias = input_bias(input.x); }

void prepare(const float* from, PlainInput& to) {
  for (int i = 0; i < kGroup; i += kLanes) store(to.x + i, load(from + i));
}

void add_bias(PlainInput&) {}

template <int V>
using Weights = I32[V];

template <int V>
TENFOLD_INLINE void load_line(const uint8_t* line, Weights<V>& weights) {
  unrolled<V>([&](auto v) TENFOLD_BODY { weights[v] = load_bits(line + v * kVectorBytes); });
}

template <class Sum, int V, int T>
TENFOLD_INLINE void start(Sum (&sums)[V][T], const QuantizedInput* input) {
  unrolled<T>([&](auto t) TENFOLD_BODY {
    unrolled<V>([&](auto v) TENFOLD_BODY { sums[v][t].start(input[t].bias); });
  });
}

// Adds columns 4 * quad .. 4 * quad + 3 of the group.
template <class Sum, int V, int T>
TENFOLD_INLINE void add_quad(Sum (&sums)[V][T], const Weights<V>& weights, const QuantizedInput* input,
                             int quad) {
  unrolled<T>([&](auto t) TENFOLD_BODY {
    const I32 x = splat_bits(input[t].x + 4 * quad);
    unrolled<V>([&](auto v) TENFOLD_BODY { sums[v][t].add(weights[v], x); });
  });
}

template <class Sum, int V, int T, class Y>
TENFOLD_INLINE void finish(const Sum (&sums)[V][T], const uint8_t* scales, const QuantizedInput* input,
                           Y& y) {
  unrolled<V>([&](auto v) TENFOLD_BODY {
    const F32 scale = load_half(scales + 2 * kLanes * v);
    unrolled<T>([&](auto t) TENFOLD_BODY {
      add(y, v, t, to_float(sums[v][t].total()), scale * splat(input[t].scale));
    });
  });
}

template <Format>
struct Kernel;

template <>
struct Kernel<Format::int4> {
  using Input = QuantizedInput;
  static constexpr bool kGroupSums = true;  // that are added to others at the end of a group

  template <int V, int T, class Y>
  static TENFOLD_INLINE void add_group(const uint8_t* scales, const uint8_t* line, const Input* input, Y& y) {
    Int4Sum sums[V][T];
    start(sums, input);
    unrolled<lines(Format::int4)>([&](auto i) TENFOLD_BODY {
      Weights<V> both, low, high;
      load_line<V>(line + i * kLineBytes, both);
      unrolled<V>([&](auto v)
                      TENFOLD_BODY { low[v] = low_weights(both[v]), high[v] = high_weights(both[v]); });
      add_quad(sums, low, input, 2 * i);
      add_quad(sums, high, input, 2 * i + 1);
    });
    finish(sums, scales, input, y);
  }
};

template <>
struct Kernel<Format::int8> {
  using Input = QuantizedInput;
  static constexpr bool kGroupSums = true;  // that are added to others at the end of a group

  template <int V, int T, class Y>
  static TENFOLD_INLINE void add_group(const uint8_t* scales, const uint8_t* line, const Input* input, Y& y) {
    Int8Sum sums[V][T];
    start(sums, input);
    unrolled<lines(Format::int8)>([&](auto i) TENFOLD_BODY {
      Weights<V> weights;
      load_line<V>(line + i * kLineBytes, weights);
      add_quad(sums, weights, input, i);
    });
    finish(sums, scales, input, y);
  }
};

template <>
struct Kernel<Format::bf16> {
  using Input = PlainInput;
  static constexpr bool kGroupSums = false;

  template <int V, int T>
  static TENFOLD_INLINE void add_group(const uint8_t*, const uint8_t* line, const Input* input,
                                       Sums<V, T>& y) {
    unrolled<lines(Format::bf16)>([&](auto i) TENFOLD_BODY {
      Weights<V> pairs;
      load_line<V>(line + i * kLineBytes, pairs);
      unrolled<kPairSteps>([&](auto step) TENFOLD_BODY {
        PairWeights weights[V];
        unrolled<V>([&](auto v) TENFOLD_BODY { weights[v] = pair_weights(pairs[v], step); });
        unrolled<T>([&](auto t) TENFOLD_BODY {
          const auto x = pair_inputs(input[t].x + 2 * i, step);
          unrolled<V>([&](auto v) TENFOLD_BODY { y[v][t] = add_product(weights[v], x, y[v][t]); });
        });
      });
    });
  }
};

constexpr int64_t fetch_ahead(Format format) { return format == Format::int8 ? 4 : 8; }  // groups
// That all passes over a block go through before any goes on: it is still in the first-level cache then, beside the
// inputs.
constexpr int64_t kChunkBytes = 18 << 10;

bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

// Whether it pays to be told what comes. Where there is little to do for a line, AMD's cores foresee it better
// themselves (docs/kernels.md).
bool fetches(Format format, int tokens) {
  const bool little = tokens == 1 && format != Format::int4 && kLanes == 16;
  return !little || is_intel();
}

// What a thread reads of a weight: a block, some times over, and then another.
template <Format format>
struct Reading {
  const uint8_t *block, *next;
  int64_t groups;
  Pass pass;

  const uint8_t* group(int64_t g) const { return block + g * group_bytes(format); }

  // Has what is read soon brought nearer while group g is multiplied, which is done in so many equal parts.
  template <int parts>
  TENFOLD_INLINE void fetch(int64_t g, int part) const {
    if (pass.count == 1) return fetch_near<parts>(g, part);
    if (part == 0) fetch_share(g);
  }

  // What follows closely: this block's next groups, behind its end the beginning of the other.
  template <int parts>
  TENFOLD_INLINE void fetch_near(int64_t g, int part) const {
    constexpr int kLines = (group_bytes(format) / 64 + parts - 1) / parts;
    const int64_t ahead = g + fetch_ahead(format);
    const uint8_t* from = ahead < groups ? group(ahead) : next + (ahead - groups) * group_bytes(format);
    unrolled<kLines>([&](auto i) TENFOLD_BODY { __builtin_prefetch(from + (part * kLines + i) * 64); });
  }

  // Of the other block what falls to this group, if all groups of all passes take the same: so memory is read all the
  // while, and not in the first pass alone.
  TENFOLD_INLINE void fetch_share(int64_t g) const {
    const int64_t share = group_bytes(format) / pass.count;
    const uint8_t* from = next + (pass.number * groups + g) * share;
    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(from + i);
  }
};

// Adds the products of groups `from` .. `to` - 1 to `out`, for the block's vectors from `first` on. Never inlined:
// what gcc makes of the loop would depend on what else it inlines.
template <Format format, int V, int T>
[[gnu::noinline]] void add_groups(const Reading<format>& reading, const uint8_t* panel, int64_t from,
                                  int64_t to, int first, float* out) {
  using K = Kernel<format>;
  const auto* input = reinterpret_cast<const typename K::Input*>(panel) + from * T;
  const auto each_group = [&](auto& y) TENFOLD_BODY {
    for (int64_t g = from; g < to; ++g, input += T) {
      if (reading.next) reading.template fetch<kVectors / V>(g, first / V);
      const uint8_t* scales = reading.group(g);
      K::template add_group<V, T>(scales + 2 * kLanes * first,
                                  scales + scale_bytes(format) + kVectorBytes * first, input, y);
    }
  };
  if constexpr (K::kGroupSums && 2 * V * T > kMostSums) {
    SumsInMemory y = {out + first * kLanes};
    each_group(y);
  } else {
    Sums<V, T> y;
    const auto each_sum = [&](const auto& body) TENFOLD_BODY {
      unrolled<V>([&](auto v) TENFOLD_BODY {
        unrolled<T>([&](auto t) TENFOLD_BODY { body(y[v][t], out + t * kBlockRows + (first + v) * kLanes); });
      });
    };
    each_sum([](F32& sum, const float* at) TENFOLD_BODY { sum = load(at); });
    each_group(y);
    each_sum([](const F32& sum, float* at) TENFOLD_BODY { store(at, sum); });
  }
}

template <Format format, int T>
void multiply(const Reading<format>& reading, const uint8_t* panel, float* out) {
  constexpr int V = tile_vectors(T, Kernel<format>::kGroupSums ? kMostGroupSums : kMostSums);
  const int64_t chunk = V == kVectors ? reading.groups : kChunkBytes / group_bytes(format);
  memset(out, 0, T * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < reading.groups; g += chunk) {
    const int64_t end = g + chunk < reading.groups ? g + chunk : reading.groups;
    for (int first = 0; first < kVectors; first += V)
      add_groups<format, V, T>(reading, panel, g, end, first, out);
  }
}

// A block that is gone through group by group, for one token.
template <Format format>
struct Stream {
  using K = Kernel<format>;
  const uint8_t* block;
  Sums<kVectors, 1> y;

  TENFOLD_INLINE void start() {
    unrolled<kVectors>([&](auto v) TENFOLD_BODY { y[v][0] = splat(0); });
  }
  TENFOLD_INLINE void add_group(int64_t g, const typename K::Input* input) {
    const uint8_t* scales = block + g * group_bytes(format);
    K::template add_group<kVectors, 1>(scales, scales + scale_bytes(format), input, y);
  }
  TENFOLD_INLINE void finish(float* out) const {
    unrolled<kVectors>([&](auto v) TENFOLD_BODY { store(out + v * kLanes, y[v][0]); });
  }
};

template <Format format>
void multiply_streams(const uint8_t* blocks, const uint8_t* panel, int64_t groups, float* out) {
  Stream<format> a = {blocks, {}}, b = {blocks + groups * group_bytes(format), {}};
  a.start(), b.start();
  const auto* input = reinterpret_cast<const typename Kernel<format>::Input*>(panel);
  for (int64_t g = 0; g < groups; ++g, ++input) a.add_group(g, input), b.add_group(g, input);
  a.finish(out), b.finish(out + kBlockRows);
}

template <Format format, int T = kMostPanelTokens>
void multiply_tokens(const Reading<format>& reading, const uint8_t* panel, int tokens, float* y) {
  if constexpr (T > 0) {
    if (tokens == T) return multiply<format, T>(reading, panel, y);
    multiply_tokens<format, T - 1>(reading, panel, tokens, y);
  }
}

void prepare(const bf16* from, auto& to) {
  float group[kGroup];
  for (int i = 0; i < kGroup; i += kLanes) store(group + i, load(from + i));
  prepare(group, to);
}

// The biases come last: bytes that are read right after they were written hold up all that follows.
template <class Input, class T>
void prepare_row(const T* x, int64_t groups, uint8_t* to, int64_t stride) {
  const auto input = [&](int64_t g) -> Input& { return *reinterpret_cast<Input*>(to + g * stride); };
  for (int64_t g = 0; g < groups; ++g) prepare(x + g * kGroup, input(g));
  for (int64_t g = 0; g < groups; ++g) add_bias(input(g));
}

template <class Input>
void gather(const uint8_t* inputs, const int32_t* tokens, int count, int64_t groups, uint8_t* panel) {
  auto* to = reinterpret_cast<Input*>(panel);
  for (int t = 0; t < count; ++t) {
    const Input* from = reinterpret_cast<const Input*>(inputs) + tokens[t] * groups;
    for (int64_t g = 0; g < groups; ++g) to[g * count + t] = from[g];
  }
}

}  // namespace

size_t input_bytes(Format format) {
  return format == Format::bf16 ? sizeof(PlainInput) : sizeof(QuantizedInput);
}

void prepare_input(Format format, const float* x, int64_t groups, uint8_t* to, int64_t stride) noexcept {
  if (format == Format::bf16) return prepare_row<PlainInput>(x, groups, to, stride);
  prepare_row<QuantizedInput>(x, groups, to, stride);
}

void prepare_input(Format format, const bf16* x, int64_t groups, uint8_t* to, int64_t stride) noexcept {
  if (format == Format::bf16) return prepare_row<PlainInput>(x, groups, to, stride);
  prepare_row<QuantizedInput>(x, groups, to, stride);
}

void gather_panel(Format format, const uint8_t* inputs, const int32_t* tokens, int count, int64_t groups,
                  uint8_t* panel) noexcept {
  if (format == Format::bf16) return gather<PlainInput>(inputs, tokens, count, groups, panel);
  gather<QuantizedInput>(inputs, tokens, count, groups, panel);
}

void multiply_block(Format format, const uint8_t* block, const uint8_t* next, Pass pass, const uint8_t* panel,
                    int tokens, int64_t groups, float* y) noexcept {
  if (!fetches(format, tokens)) next = nullptr;
  switch (format) {
    case Format::bf16: return multiply_tokens<Format::bf16>({block, next, groups, pass}, panel, tokens, y);
    case Format::int8: return multiply_tokens<Format::int8>({block, next, groups, pass}, panel, tokens, y);
    case Format::int4: return multiply_tokens<Format::int4>({block, next, groups, pass}, panel, tokens, y);
  }
}

bool in_pairs(Format format) noexcept { return !fetches(format, 1); }

void multiply_pair(Format format, const uint8_t* blocks, const uint8_t* panel, int64_t groups,
                   float* y) noexcept {
  switch (format) {
    case Format::bf16: return multiply_streams<Format::bf16>(blocks, panel, groups, y);
    case Format::int8: return multiply_streams<Format::int8>(blocks, panel, groups, y);
    case Format::int4: return multiply_streams<Format::int4>(blocks, panel, groups, y);
  }
}

}  // namespace tenfold::TENFOLD_ISA
