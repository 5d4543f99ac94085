// Any processor, by the compiler's vector types: 4 lanes, 16 registers. Correct first; no one buys it for its
// speed.

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kLanes = 4;
constexpr int kRegisters = 16;
using F32 = float __attribute__((vector_size(16)));
using I32 = int32_t __attribute__((vector_size(16)));
using U32 = uint32_t __attribute__((vector_size(16)));
using U16 = uint16_t __attribute__((vector_size(8)));

TENFOLD_INLINE I32 splat_int(int32_t x) { return I32{x, x, x, x}; }
TENFOLD_INLINE F32 splat(float x) { return F32{x, x, x, x}; }
TENFOLD_INLINE F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
TENFOLD_INLINE I32 to_int(F32 x) { return __builtin_convertvector(x, I32); }
TENFOLD_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }  // b where either is NaN
TENFOLD_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
TENFOLD_INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
// Adding and taking off 1.5 * 2^23 rounds to the nearest, for what is below 2^22.
TENFOLD_INLINE F32 round(F32 x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
TENFOLD_INLINE F32 scale_by_power_of_two(F32 x, F32 n) { return (F32)((I32)x + (to_int(n) << 23)); }
TENFOLD_INLINE float sum(F32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
TENFOLD_INLINE float larger(float a, float b) { return a > b ? a : b; }
TENFOLD_INLINE float largest(F32 x) { return larger(larger(x[0], x[2]), larger(x[1], x[3])); }
TENFOLD_INLINE F32 low_halves(F32 a, F32 b) { return F32{a[0], a[1], b[0], b[1]}; }
TENFOLD_INLINE F32 high_halves(F32 a, F32 b) { return F32{a[2], a[3], b[2], b[3]}; }
// Lane i is the sum of x[i].
TENFOLD_INLINE F32 sum_each(const F32 (&x)[kLanes]) {
  return F32{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])};
}

TENFOLD_INLINE F32 load(const float* p) { return read<F32>(p); }
TENFOLD_INLINE F32 load(const bf16* p) { return (F32)(__builtin_convertvector(read<U16>(p), U32) << 16); }
// Moves the exponent and the fraction to their places, then multiplies by 2^112 to mend the exponent's bias:
// this is exact for subnormal halves too. The largest exponent stands for infinity and NaN.
TENFOLD_INLINE F32 load_half(const uint8_t* p) {
  const U32 bits = __builtin_convertvector(read<U16>(p), U32);
  const F32 magnitude = (F32)((bits & 0x7fff) << 13) * splat(0x1p112f);
  const U32 special = magnitude >= splat(65536.0f) ? U32{} + 0x7f800000 : U32{};
  return (F32)((U32)magnitude | special | (bits & 0x8000) << 16);
}
TENFOLD_INLINE void store(float* p, F32 x) { memcpy(p, &x, sizeof x); }
// To the nearest half, by adding to the magnitude a number whose last bit has the place of the half's.
TENFOLD_INLINE void store(half* p, F32 x) {
  const U32 sign = (U32)x & 0x80000000;
  const F32 magnitude = (F32)((U32)x ^ sign);
  const U32 exponent = (U32)max(magnitude, splat(0x1p-14f)) & 0x7f800000;
  const F32 shift = (F32)(exponent + (13 << 23));
  const F32 rounded = (magnitude + shift) - shift;
  const U32 finite = (U32)(rounded * splat(0x1p-112f)) >> 13;
  U32 bits = rounded < splat(65536.0f) ? finite : U32{} + 0x7c00;
  bits = x == x ? bits : U32{} + 0x7e00;
  const U16 result = __builtin_convertvector(bits | sign >> 16, U16);
  memcpy(p, &result, sizeof result);
}
TENFOLD_INLINE void store(bf16* p, F32 x) {
  const U32 bits = (U32)x;
  const U32 nearest = bits + ((bits >> 16) & 1) + 0x7fff;
  const U32 rounded = (x == x ? nearest : U32{} + 0x7fc00000) >> 16;
  const U16 half = __builtin_convertvector(rounded, U16);
  memcpy(p, &half, sizeof half);
}

TENFOLD_INLINE I32 load_bits(const void* p) { return read<I32>(p); }
TENFOLD_INLINE I32 splat_bits(const void* p) { return splat_int(read<int32_t>(p)); }
TENFOLD_INLINE uint32_t largest_magnitude(F32 a, F32 b) {
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t x = ((U32)a)[i] & 0x7fffffff, y = ((U32)b)[i] & 0x7fffffff;
    largest = x > largest ? x : largest;
    largest = y > largest ? y : largest;
  }
  return largest;
}
TENFOLD_INLINE void store_int8(int8_t* p, F32 x) {
  const I32 whole = to_int(round(x));
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(whole[i]);
}
TENFOLD_INLINE void store_bits(void* p, I32 x) { memcpy(p, &x, sizeof x); }
TENFOLD_INLINE void store_int16(int16_t* p, F32 x) {
  const I32 whole = to_int(round(x));
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(whole[i]);
}
// A lane holds a pair of 16-bit numbers: two products go to its sum.
TENFOLD_INLINE I32 load_pairs(const int8_t* p) {
  using I8 = int8_t __attribute__((vector_size(8)));
  using I16 = int16_t __attribute__((vector_size(16)));
  return (I32) __builtin_convertvector(read<I8>(p), I16);
}
TENFOLD_INLINE I32 add_pairs(I32 sum, I32 a, I32 b) {
  return sum + ((I32)((U32)a << 16) >> 16) * ((I32)((U32)b << 16) >> 16) + (a >> 16) * (b >> 16);
}

// The sum of a group's 32 products weight x input in every lane, byte by byte of the lanes.
struct Int8Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t) { sum = I32{}; }
  TENFOLD_INLINE void add(I32 weights, I32 input) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      sum += ((I32)((U32)weights << shift) >> 24) * ((I32)((U32)input << shift) >> 24);
    }
  }
  TENFOLD_INLINE I32 total() const { return sum; }
};
using Int4Sum = Int8Sum;
TENFOLD_INLINE I32 low_weights(I32 nibbles) {
  int8_t weights[4 * kLanes];
  memcpy(weights, &nibbles, sizeof weights);
  for (int8_t& weight : weights) weight = kInt4Grid[weight & 15];
  return load_bits(weights);
}
TENFOLD_INLINE I32 high_weights(I32 nibbles) { return low_weights(nibbles >> 4); }

TENFOLD_INLINE int32_t input_bias(const int8_t*) { return 0; }  // these weights carry no offset

// Two columns of bf16 in a lane: they meet their inputs one after the other, in fp32.
constexpr int kPairSteps = 2;
using PairWeights = F32;
using PairInput = float;
TENFOLD_INLINE PairWeights pair_weights(I32 pair, int step) {
  return (F32)(step == 0 ? (U32)pair << 16 : (U32)pair & 0xffff0000);
}
TENFOLD_INLINE F32 pair_inputs(const PairInput* pair, int step) { return splat(pair[step]); }
// The second of each pair counts as zero.
TENFOLD_INLINE I32 first_of_pairs(I32 pairs) { return pairs & 0xffff; }
TENFOLD_INLINE F32 add_product(F32 weights, F32 input, F32 sum) { return fma(weights, input, sum); }

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
