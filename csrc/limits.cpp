// What bounds the kernels: how fast memory can be read, and numbers multiplied.

#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

// As in a tile: each of some weights meets each of some inputs, so no product is the same as another.
constexpr int kSteps = 500, kProducts = 64, kWeights = 2, kInputs = kRegisters == 32 ? 12 : 6;

struct Numbers {
  alignas(64) uint8_t bytes[128];
};

// fp32 sums that live on through all steps.
template <class Multiply>
void add_up_floats(const uint8_t* inputs, Numbers& out, const Multiply& multiply) {
  F32 sums[kWeights][kInputs];
  unrolled<kInputs>([&](auto i) TENFOLD_BODY { sums[0][i] = splat(0), sums[1][i] = splat(0); });
  for (int64_t step = 0; step < kSteps * kProducts; ++step) {
    asm volatile("" : "+r"(inputs));
    unrolled<kInputs>([&](auto i) TENFOLD_BODY { multiply(inputs + 4 * i, sums[0][i], sums[1][i]); });
  }
  F32 total = splat(0);
  unrolled<kInputs>([&](auto i) TENFOLD_BODY { total = total + (sums[0][i] + sums[1][i]); });
  store_bits(out.bytes, (I32)total);
}

void add_up_f32(const Numbers& weights, const uint8_t* inputs, Numbers& out) {
  const F32 first = (F32)load_bits(weights.bytes), second = (F32)load_bits(weights.bytes + sizeof(I32));
  add_up_floats(inputs, out, [&](const uint8_t* input, F32& a, F32& b) TENFOLD_BODY {
    const F32 x = splat(read<float>(input));
    a = fma(first, x, a), b = fma(second, x, b);
  });
}

void add_up_bf16(const Numbers& weights, const uint8_t* inputs, Numbers& out) {
  const auto first = pair_weights(load_bits(weights.bytes), 0);
  const auto second = pair_weights(load_bits(weights.bytes + sizeof(I32)), 0);
  add_up_floats(inputs, out, [&](const uint8_t* input, F32& a, F32& b) TENFOLD_BODY {
    const auto x = pair_inputs(reinterpret_cast<const PairInput*>(input), 0);
    a = add_product(first, x, a), b = add_product(second, x, b);
  });
}

// Of products of 4 bytes a lane.
template <class Sum>
struct BytesSum : Sum {
  TENFOLD_INLINE void add(I32 weights, const uint8_t* input) { Sum::add(weights, splat_bits(input)); }
};

// Of products of a pair of 16-bit numbers a lane.
struct PairsSum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t) { sum = I32{}; }
  TENFOLD_INLINE void add(I32 pairs, I32 input) { sum = add_pairs(sum, pairs, input); }
  TENFOLD_INLINE I32 total() const { return sum; }
};

// Adds up products in registers. Inputs are read from where the compiler cannot tell: none is computed beforehand.
template <class Sum>
void add_up_bytes(const Numbers& weights, const uint8_t* inputs, Numbers& out) {
  const I32 first = load_bits(weights.bytes), second = load_bits(weights.bytes + sizeof(I32));
  I32 folded = first ^ second;
  for (int64_t step = 0; step < kSteps; ++step) {
    // Short-lived, as in a tile: of sums that live on, gcc would keep copies in memory.
    Sum sums[kWeights][kInputs];
    unrolled<kInputs>([&](auto i) TENFOLD_BODY { sums[0][i].start(0), sums[1][i].start(0); });
    unrolled<kProducts>([&](auto j) TENFOLD_BODY {
      asm volatile("" : "+r"(inputs));  // or the same products would be taken from before
      unrolled<kInputs>([&](auto i) TENFOLD_BODY {
        sums[0][i].add(first, inputs + 4 * ((i + j) % 16));
        sums[1][i].add(second, inputs + 4 * ((i + j) % 16));
      });
    });
    unrolled<kInputs>([&](auto i) TENFOLD_BODY { folded ^= sums[0][i].total() ^ sums[1][i].total(); });
  }
  store_bits(out.bytes, folded);
}

}  // namespace

uint64_t read_memory(const uint8_t* from, size_t bytes) noexcept {
  I32 sums[8] = {};
  for (size_t i = 0; i + sizeof sums <= bytes; i += sizeof sums) {
    for (size_t j = 0; j < 8; ++j) sums[j] ^= load_bits(from + i + j * sizeof(I32));
  }
  uint64_t folded = 0;
  for (const I32& sum : sums) folded ^= read<uint64_t>(&sum);
  return folded;
}

int64_t multiply_in_registers(Multiplier multiplier) noexcept {
  Numbers weights = {}, inputs = {}, out;
  asm volatile("" : : "r"(&weights), "r"(&inputs), "r"(&out) : "memory");
  int64_t products = kSteps * kProducts * kWeights * kInputs * kLanes;
  switch (multiplier) {
    case Multiplier::f32: add_up_f32(weights, inputs.bytes, out); break;
    case Multiplier::bf16: add_up_bf16(weights, inputs.bytes, out), products *= 2 / kPairSteps; break;
    case Multiplier::int16:
      add_up_bytes<BytesSum<PairsSum>>(weights, inputs.bytes, out), products *= 2;
      break;
    case Multiplier::int8: add_up_bytes<BytesSum<Int8Sum>>(weights, inputs.bytes, out), products *= 4; break;
    case Multiplier::int4: add_up_bytes<BytesSum<Int4Sum>>(weights, inputs.bytes, out), products *= 4; break;
  }
  asm volatile("" : : "r"(&out) : "memory");
  return products;
}

}  // namespace tenfold::TENFOLD_ISA
