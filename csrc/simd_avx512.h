// AVX-512 with VNNI and BF16: 16 lanes, 32 registers.
#include <immintrin.h>

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using F32 = __m512;
using I32 = __m512i;

TENFOLD_INLINE F32 splat(float x) { return _mm512_set1_ps(x); }
TENFOLD_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
TENFOLD_INLINE F32 load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
TENFOLD_INLINE F32 load_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
TENFOLD_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
TENFOLD_INLINE void store(half* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TENFOLD_INLINE void store(bf16* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}
TENFOLD_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
TENFOLD_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // b where either is NaN
TENFOLD_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
TENFOLD_INLINE F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
TENFOLD_INLINE F32 scale_by_power_of_two(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
TENFOLD_INLINE float sum(F32 x) { return _mm512_reduce_add_ps(x); }
TENFOLD_INLINE float largest(F32 x) { return _mm512_reduce_max_ps(x); }
TENFOLD_INLINE F32 low_halves(F32 a, F32 b) { return _mm512_shuffle_f32x4(a, b, 0x44); }
TENFOLD_INLINE F32 high_halves(F32 a, F32 b) { return _mm512_shuffle_f32x4(a, b, 0xee); }
TENFOLD_INLINE F32 sum_pairs(F32 a, F32 b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); }
TENFOLD_INLINE F32 sum_quads(F32 a, F32 b, F32 c, F32 d) {
  const __m512d ab = (__m512d)sum_pairs(a, b), cd = (__m512d)sum_pairs(c, d);
  return (F32)_mm512_unpacklo_pd(ab, cd) + (F32)_mm512_unpackhi_pd(ab, cd);
}
TENFOLD_INLINE F32 sum_halves(F32 a, F32 b) { return low_halves(a, b) + high_halves(a, b); }
// Lane i is the sum of x[i].
TENFOLD_INLINE F32 sum_each(const F32 (&x)[kLanes]) {
  const F32 low = sum_halves(sum_quads(x[0], x[1], x[2], x[3]), sum_quads(x[4], x[5], x[6], x[7]));
  const F32 high = sum_halves(sum_quads(x[8], x[9], x[10], x[11]), sum_quads(x[12], x[13], x[14], x[15]));
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}
TENFOLD_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }

TENFOLD_INLINE I32 load_bits(const void* p) { return _mm512_loadu_si512(p); }
TENFOLD_INLINE I32 splat_bits(const void* p) { return _mm512_set1_epi32(read<int32_t>(p)); }
TENFOLD_INLINE uint32_t largest_magnitude(F32 a, F32 b) {
  const I32 finite = _mm512_set1_epi32(0x7fffffff);
  return _mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_and_si512((I32)a, finite), _mm512_and_si512((I32)b, finite)));
}
TENFOLD_INLINE void store_int8(int8_t* p, F32 x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

TENFOLD_INLINE void store_bits(void* p, I32 x) { _mm512_storeu_si512(p, x); }
TENFOLD_INLINE void store_int16(int16_t* p, F32 x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
// A lane holds a pair of 16-bit numbers: two products go to its sum.
TENFOLD_INLINE I32 load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
TENFOLD_INLINE I32 add_pairs(I32 sum, I32 a, I32 b) { return _mm512_dpwssd_epi32(sum, a, b); }

// The sum of a group's 32 products weight x input in every lane. The instruction takes unsigned weights, so they
// carry an offset, 16 for int4 and 128 for int8, and the input's bias, -16 times its sum, takes it off again.
TENFOLD_INLINE I32 low_weights(I32 nibbles) {
  const __m128i grid = _mm_add_epi8(_mm_loadu_si128((const __m128i*)kInt4Grid), _mm_set1_epi8(16));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(grid), _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
}
TENFOLD_INLINE I32 high_weights(I32 nibbles) { return low_weights(_mm512_srli_epi16(nibbles, 4)); }
struct Int4Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t bias) { sum = _mm512_set1_epi32(bias); }
  TENFOLD_INLINE void add(I32 weights, I32 input) { sum = _mm512_dpbusd_epi32(sum, weights, input); }
  TENFOLD_INLINE I32 total() const { return sum; }
};
struct Int8Sum {
  I32 sum;
  TENFOLD_INLINE void start(int32_t bias) { sum = _mm512_set1_epi32(bias * 8); }
  TENFOLD_INLINE void add(I32 weights, I32 input) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights, _mm512_set1_epi8(-128)), input);
  }
  TENFOLD_INLINE I32 total() const { return sum; }
};

TENFOLD_INLINE int32_t input_bias(const int8_t* input) {
  const __m256i products = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(16),
                                               _mm256_loadu_si256((const __m256i*)input));
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(products), _mm256_extracti128_si256(products, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return -(_mm_cvtsi128_si32(pair) + _mm_extract_epi32(pair, 1));
}

// Two columns of bf16 in a lane, which one instruction multiplies with two inputs and adds.
constexpr int kPairSteps = 1;
using PairWeights = I32;
using PairInput = bf16;
TENFOLD_INLINE PairWeights pair_weights(I32 pair, int) { return pair; }
TENFOLD_INLINE I32 pair_inputs(const PairInput* pair, int) { return splat_bits(pair); }
// The second of each pair counts as zero.
TENFOLD_INLINE I32 first_of_pairs(I32 pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)); }
TENFOLD_INLINE F32 add_product(I32 weights, I32 input, F32 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)input);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
