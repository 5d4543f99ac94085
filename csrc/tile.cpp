#include "tile.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kVectors = kBlockRows / kLanes;  // that hold a value for each row of a block
constexpr int kVectorBytes = 4 * kLanes;

// How many of a block's vectors a tile takes at once: as many as leave `registers_each` registers for each of
// its sums.
constexpr int tile_vectors(int tokens, int registers_each) {
  int vectors = kVectors;
  while (vectors > 1 && vectors * tokens * registers_each > kPanelTokens * 2) vectors /= 2;
  return vectors;
}

template <int V, int T>
using Sums = F32[V][T];

struct QuantizedInput {
  int8_t x[kGroup];
  float scale;
  int32_t bias;
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
  to.bias = input_bias(to.x);
}

void prepare(const float* from, Bf16Input& to) { to_bf16_input(from, to); }

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

template <class Sum, int V, int T>
TENFOLD_INLINE void finish(const Sum (&sums)[V][T], const uint8_t* scales, const QuantizedInput* input,
                           Sums<V, T>& y) {
  unrolled<V>([&](auto v) TENFOLD_BODY {
    const F32 scale = load_half(scales + 2 * kLanes * v);
    unrolled<T>([&](auto t) TENFOLD_BODY {
      y[v][t] = fma(to_float(sums[v][t].total()), scale * splat(input[t].scale), y[v][t]);
    });
  });
}

template <Format>
struct Kernel;

template <>
struct Kernel<Format::int4> {
  using Input = QuantizedInput;
  static constexpr int kRegistersEach = 2;

  template <int V, int T>
  static TENFOLD_INLINE void add_group(const uint8_t* scales, const uint8_t* line, const Input* input,
                                       Sums<V, T>& y) {
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
  static constexpr int kRegistersEach = 2;

  template <int V, int T>
  static TENFOLD_INLINE void add_group(const uint8_t* scales, const uint8_t* line, const Input* input,
                                       Sums<V, T>& y) {
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
  using Input = Bf16Input;
  static constexpr int kRegistersEach = 1;

  template <int V, int T>
  static TENFOLD_INLINE void add_group(const uint8_t*, const uint8_t* line, const Input* input,
                                       Sums<V, T>& y) {
    unrolled<lines(Format::bf16)>([&](auto i) TENFOLD_BODY {
      Weights<V> pairs;
      load_line<V>(line + i * kLineBytes, pairs);
      unrolled<kLineSteps>([&](auto step) TENFOLD_BODY {
        StepWeights weights[V];
        unrolled<V>([&](auto v) TENFOLD_BODY { weights[v] = step_weights(pairs[v], step); });
        unrolled<T>([&](auto t) TENFOLD_BODY {
          const auto x = step_input(input[t], i, step);
          unrolled<V>([&](auto v) TENFOLD_BODY { y[v][t] = add_product(weights[v], x, y[v][t]); });
        });
      });
    });
  }
};

template <Format format, int T>
void multiply(const uint8_t* block, const uint8_t* panel, int64_t groups, float* out) {
  using K = Kernel<format>;
  constexpr int V = tile_vectors(T, K::kRegistersEach);
  for (int first = 0; first < kVectors; first += V) {
    Sums<V, T> y;
    unrolled<V>([&](auto v) TENFOLD_BODY { unrolled<T>([&](auto t) TENFOLD_BODY { y[v][t] = splat(0); }); });
    const uint8_t* scales = block + 2 * kLanes * first;
    const uint8_t* line = block + scale_bytes(format) + kVectorBytes * first;
    const auto* input = reinterpret_cast<const typename K::Input*>(panel);
    for (int64_t g = 0; g < groups; ++g, input += T) {
      K::template add_group<V, T>(scales, line, input, y);
      scales += group_bytes(format), line += group_bytes(format);
    }
    unrolled<V>([&](auto v) TENFOLD_BODY {
      unrolled<T>([&](auto t) TENFOLD_BODY { store(out + t * kBlockRows + (first + v) * kLanes, y[v][t]); });
    });
  }
}

// A block that is gone through group by group, for one token.
template <Format format>
struct Stream {
  using K = Kernel<format>;
  const uint8_t *scales, *line;
  Sums<kVectors, 1> y;

  TENFOLD_INLINE void start(const uint8_t* block) {
    scales = block, line = block + scale_bytes(format);
    unrolled<kVectors>([&](auto v) TENFOLD_BODY { y[v][0] = splat(0); });
  }
  TENFOLD_INLINE void add_group(const typename K::Input* input) {
    K::template add_group<kVectors, 1>(scales, line, input, y);
    scales += group_bytes(format), line += group_bytes(format);
  }
  TENFOLD_INLINE void finish(float* out) const {
    unrolled<kVectors>([&](auto v) TENFOLD_BODY { store(out + v * kLanes, y[v][0]); });
  }
};

template <Format format>
void multiply_streams(const uint8_t* first, const uint8_t* second, const uint8_t* panel, int64_t groups,
                      float* out) {
  Stream<format> a, b;
  a.start(first), b.start(second);
  const auto* input = reinterpret_cast<const typename Kernel<format>::Input*>(panel);
  for (int64_t g = 0; g < groups; ++g, ++input) a.add_group(input), b.add_group(input);
  a.finish(out), b.finish(out + kBlockRows);
}

template <Format format, int T = kPanelTokens>
void multiply_tokens(const uint8_t* block, const uint8_t* panel, int tokens, int64_t groups, float* y) {
  if constexpr (T > 0) {
    if (tokens == T) return multiply<format, T>(block, panel, groups, y);
    multiply_tokens<format, T - 1>(block, panel, tokens, groups, y);
  }
}

template <class Input>
void prepare_row(const float* x, int64_t groups, uint8_t* to, int64_t stride) {
  for (int64_t g = 0; g < groups; ++g) prepare(x + g * kGroup, *reinterpret_cast<Input*>(to + g * stride));
}

template <class Input>
void prepare_row(const bf16* x, int64_t groups, uint8_t* to, int64_t stride) {
  for (int64_t g = 0; g < groups; ++g) {
    float group[kGroup];
    for (int i = 0; i < kGroup; i += kLanes) store(group + i, load(x + g * kGroup + i));
    prepare(group, *reinterpret_cast<Input*>(to + g * stride));
  }
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
  return format == Format::bf16 ? sizeof(Bf16Input) : sizeof(QuantizedInput);
}

void prepare_input(Format format, const float* x, int64_t groups, uint8_t* to, int64_t stride) noexcept {
  if (format == Format::bf16) return prepare_row<Bf16Input>(x, groups, to, stride);
  prepare_row<QuantizedInput>(x, groups, to, stride);
}

void prepare_input(Format format, const bf16* x, int64_t groups, uint8_t* to, int64_t stride) noexcept {
  if (format == Format::bf16) return prepare_row<Bf16Input>(x, groups, to, stride);
  prepare_row<QuantizedInput>(x, groups, to, stride);
}

void gather_panel(Format format, const uint8_t* inputs, const int32_t* tokens, int count, int64_t groups,
                  uint8_t* panel) noexcept {
  if (format == Format::bf16) return gather<Bf16Input>(inputs, tokens, count, groups, panel);
  gather<QuantizedInput>(inputs, tokens, count, groups, panel);
}

void multiply_block(Format format, const uint8_t* block, const uint8_t* panel, int tokens, int64_t groups,
                    float* y) noexcept {
  switch (format) {
    case Format::bf16: return multiply_tokens<Format::bf16>(block, panel, tokens, groups, y);
    case Format::int8: return multiply_tokens<Format::int8>(block, panel, tokens, groups, y);
    case Format::int4: return multiply_tokens<Format::int4>(block, panel, tokens, groups, y);
  }
}

void multiply_pair(Format format, const uint8_t* first, const uint8_t* second, const uint8_t* panel,
                   int64_t groups, float* y) noexcept {
  switch (format) {
    case Format::bf16: return multiply_streams<Format::bf16>(first, second, panel, groups, y);
    case Format::int8: return multiply_streams<Format::int8>(first, second, panel, groups, y);
    case Format::int4: return multiply_streams<Format::int4>(first, second, panel, groups, y);
  }
}

}  // namespace tenfold::TENFOLD_ISA
