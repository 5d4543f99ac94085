// Vectors of one instruction set, under the same names for all: F32 and I32 of kLanes lanes.
//
// Every kernel file is compiled once per instruction set, with TENFOLD_ISA naming its namespace. All here has
// internal linkage, and kernel files use no templates of the standard library: otherwise the linker could
// pick AVX-512 code for a function that the baseline calls too. Floats have the operators + - * /; nothing is
// contracted to a fused multiply-add but what calls `fma`, so that two paths that compute one thing agree to
// the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "thread_pool.h"

#define TENFOLD_INLINE inline __attribute__((always_inline))
#define TENFOLD_BODY __attribute__((always_inline))  // of a lambda

namespace tenfold::TENFOLD_ISA {
namespace {

template <int N>
struct Constant {
  constexpr operator int() const { return N; }
};

// body(0), body(1), ... body(N - 1) with constants. A loop would do the same, but the arrays that it indexes
// are in registers only if the compiler unrolls it early enough; gcc does not.
template <int N, class F>
TENFOLD_INLINE void unrolled(const F& body) {
  if constexpr (N > 0) {
    unrolled<N - 1>(body);
    body(Constant<N - 1>());
  }
}

template <class T>
T read(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace tenfold::TENFOLD_ISA {
namespace {

TENFOLD_INLINE float to_float(float x) { return x; }
TENFOLD_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return read<float>(&bits);
}

TENFOLD_INLINE F32 load(const half* p) { return load_half(reinterpret_cast<const uint8_t*>(p)); }

// e^x to 2 ulp; 0 below -87, the largest power above 88; NaN stays NaN.
TENFOLD_INLINE F32 exp(F32 x) {
  const F32 bounded = max(splat(-87.3f), min(splat(88.3f), x));
  const F32 n = round(bounded * splat(1.44269504f));
  const F32 r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), bounded));
  constexpr float kTaylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F32 p = splat(1.0f / 720);
  for (const float c : kTaylor) p = fma(p, r, splat(c));
  return scale_by_power_of_two(p, n);
}

TENFOLD_INLINE F32 sigmoid(F32 x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

TENFOLD_INLINE F32 silu(F32 x) { return x * sigmoid(x); }

// run(task, thread) for tasks 0 .. tasks - 1, on the pool.
template <class F>
void parallel_for(int64_t tasks, const F& run, int most_threads = kMostThreads) {
  run_tasks(
      tasks, most_threads,
      [](const void* context, int64_t task, int thread) noexcept {
        (*static_cast<const F*>(context))(task, thread);
      },
      &run);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
