// AVX2 with FMA and F16C, and with or without AVX-VNNI: 8 lanes, 16 registers.
#include <immintrin.h>

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using F32 = __m256;
using I32 = __m256i;

TENFOLD_INLINE F32 splat(float x) { return _mm256_set1_ps(x); }
TENFOLD_INLINE F32 load(const float* p) { return _mm256_loadu_ps(p); }
TENFOLD_INLINE F32 load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
TENFOLD_INLINE F32 load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
TENFOLD_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
TENFOLD_INLINE void store(half* p, F32 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TENFOLD_INLINE void store(bf16* p, F32 x) {
  const I32 bits = (I32)x;
  const I32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I32 nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const I32 nan = (I32)_mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const I32 rounded = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const I32 packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0b1000);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
TENFOLD_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
TENFOLD_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }  // b where either is NaN
TENFOLD_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
TENFOLD_INLINE F32 round(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TENFOLD_INLINE F32 scale_by_power_of_two(F32 x, F32 n) {
  return (F32)_mm256_add_epi32((I32)x, _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
}
TENFOLD_INLINE float sum(F32 x) {
  const __m128 half = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
  const __m128 pair = half + _mm_movehl_ps(half, half);
  return _mm_cvtss_f32(pair) + _mm_cvtss_f32(_mm_movehdup_ps(pair));
}
TENFOLD_INLINE float largest(F32 x) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
TENFOLD_INLINE F32 low_halves(F32 a, F32 b) { return _mm256_permute2f128_ps(a, b, 0x20); }
TENFOLD_INLINE F32 high_halves(F32 a, F32 b) { return _mm256_permute2f128_ps(a, b, 0x31); }
TENFOLD_INLINE F32 sum_pairs(F32 a, F32 b) { return _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b); }
TENFOLD_INLINE F32 sum_quads(F32 a, F32 b, F32 c, F32 d) {
  const __m256d ab = (__m256d)sum_pairs(a, b), cd = (__m256d)sum_pairs(c, d);
  return (F32)_mm256_unpacklo_pd(ab, cd) + (F32)_mm256_unpackhi_pd(ab, cd);
}
// Lane i is the sum of x[i].
TENFOLD_INLINE F32 sum_each(const F32 (&x)[kLanes]) {
  const F32 low = sum_quads(x[0], x[1], x[2], x[3]), high = sum_quads(x[4], x[5], x[6], x[7]);
  return low_halves(low, high) + high_halves(low, high);
}
TENFOLD_INLINE F32 to_float(I32 x) { return _mm256_cvtepi32_ps(x); }

TENFOLD_INLINE I32 load_bits(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
TENFOLD_INLINE I32 splat_bits(const void* p) { return _mm256_set1_epi32(read<int32_t>(p)); }
TENFOLD_INLINE uint32_t largest_magnitude(F32 a, F32 b) {
  const I32 finite = _mm256_set1_epi32(0x7fffffff);
  const I32 both = _mm256_max_epi32(_mm256_and_si256((I32)a, finite), _mm256_and_si256((I32)b, finite));
  const __m128i half = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  const __m128i pair = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_max_epi32(pair, _mm_shuffle_epi32(pair, 1)));
}
TENFOLD_INLINE void store_int8(int8_t* p, F32 x) {
  const I32 whole = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

TENFOLD_INLINE void store_bits(void* p, I32 x) { _mm256_storeu_si256((__m256i*)p, x); }
TENFOLD_INLINE void store_int16(int16_t* p, F32 x) {
  const I32 whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
// A lane holds a pair of 16-bit numbers: two products go to its sum.
TENFOLD_INLINE I32 load_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
#if defined(__AVXVNNI__)
TENFOLD_INLINE I32 add_pairs(I32 sum, I32 a, I32 b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
#else
TENFOLD_INLINE I32 add_pairs(I32 sum, I32 a, I32 b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#endif

TENFOLD_INLINE I32 low_weights(I32 nibbles) {
  const __m128i grid = _mm_add_epi8(_mm_loadu_si128((const __m128i*)kInt4Grid), _mm_set1_epi8(16));
  const I32 places = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(grid), places);
}
TENFOLD_INLINE I32 high_weights(I32 nibbles) { return low_weights(_mm256_srli_epi16(nibbles, 4)); }
// The sum of a group's 32 products weight x input in every lane.
#if defined(__AVXVNNI__)
// The instruction takes unsigned weights, so they carry an offset, 16 for int4 and 128 for int8, and the input's bias, -16
// times its sum, takes it off again.
struct Int4Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t bias) { sum = _mm256_set1_epi32(bias); }
  TENFOLD_INLINE void add(I32 weights, I32 input) { sum = _mm256_dpbusd_avx_epi32(sum, weights, input); }
  TENFOLD_INLINE I32 total() const { return sum; }
};
struct Int8Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t bias) { sum = _mm256_set1_epi32(bias * 8); }
  TENFOLD_INLINE void add(I32 weights, I32 input) {
    sum = _mm256_dpbusd_avx_epi32(sum, _mm256_xor_si256(weights, _mm256_set1_epi8(-128)), input);
  }
  TENFOLD_INLINE I32 total() const { return sum; }
};
TENFOLD_INLINE int32_t input_bias(const int8_t* input) {
  const I32 products =
      _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(16), load_bits(input));
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(products), _mm256_extracti128_si256(products, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return -(_mm_cvtsi128_si32(pair) + _mm_extract_epi32(pair, 1));
}
#else
// The weights of int4, with an offset of 16 since they must be unsigned, are summed in 16 bits: a lane has two such sums,
// of columns 0, 1 and 2, 3 modulo 4. The bias, -16 times the input's sums, is a pair as well; with it a sum is at most
// 16 * 16 * 127, so it fits although it may wrap on the way.
struct Int4Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t bias) { sum = _mm256_set1_epi32(bias); }
  TENFOLD_INLINE void add(I32 weights, I32 input) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, input));
  }
  TENFOLD_INLINE I32 total() const { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};
// Two products of bytes just fit 16 bits, if the first is unsigned and at most 128: the weight gives its sign
// away.
struct Int8Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t) { sum = _mm256_setzero_si256(); }
  TENFOLD_INLINE void add(I32 weights, I32 input) {
    const I32 pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(input, weights));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  TENFOLD_INLINE I32 total() const { return sum; }
};
TENFOLD_INLINE int32_t input_bias(const int8_t* input) {
  const I32 products = _mm256_maddubs_epi16(_mm256_set1_epi8(16), load_bits(input));
  const __m128i half = _mm_add_epi16(_mm256_castsi256_si128(products), _mm256_extracti128_si256(products, 1));
  const __m128i quarter = _mm_add_epi16(half, _mm_unpackhi_epi64(half, half));
  const __m128i pair = _mm_add_epi16(quarter, _mm_shuffle_epi32(quarter, 1));
  return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), pair));
}
#endif

// Two columns of bf16 in a lane: they meet their inputs one after the other, in fp32.
constexpr int kPairSteps = 2;
using PairWeights = F32;
using PairInput = float;
TENFOLD_INLINE PairWeights pair_weights(I32 pair, int step) {
  return (F32)(step == 0 ? _mm256_slli_epi32(pair, 16)
                         : _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
TENFOLD_INLINE F32 pair_inputs(const PairInput* pair, int step) { return splat(pair[step]); }
// The second of each pair counts as zero.
TENFOLD_INLINE I32 first_of_pairs(I32 pairs) { return _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)); }
TENFOLD_INLINE F32 add_product(F32 weights, F32 input, F32 sum) { return fma(weights, input, sum); }

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
