// The kernels as the rest of the module sees them: plain views of memory, and one table of functions per
// instruction set.
//
// Kernels are unchecked and never throw: bindings.cpp checks every argument first. They allocate nothing: a
// kernel that needs memory has a twin `<kernel>_scratch` that says how many bytes, and finds them in
// `scratch`, aligned to 64.
//
// To add a kernel: a view struct and a line in TENFOLD_KERNELS below, the function in a file that
// CMakeLists.txt lists under KERNEL_FILES (inside `namespace tenfold::TENFOLD_ISA`, everything else of that
// file in an anonymous namespace, vectors from simd.h), checks and a binding in bindings.cpp, the typed face
// in src/tenfold/kernels/cpu.py.
//
// Shape letters: T tokens, D hidden, E experts, F expert width, N and K the rows and columns of a weight.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace tenfold {

enum class DType : uint8_t { f32, bf16 };

struct bf16 {
  uint16_t bits;
};

// Rows of activations; elements of a row are neighbours, rows are `stride` elements apart.
struct Rows {
  void* data;
  DType dtype;
  int64_t rows, cols, stride;
};

// A weight [N, K] in the layout of formats.h.
struct PackedMatrix {
  const uint8_t* data;
  Format format;
  int64_t rows, cols;
};

// outputs[i] = x weights[i]^T for every i: projections of one input are one call.
struct Product {
  Rows x;
  const PackedMatrix* weights;
  const Rows* outputs;
  int64_t count;
  void* scratch;
};

// out[t] = sum over j of weights[t, j] * down[e] swiglu(gate[e] x[t], up[e] x[t]) with e = chosen[t, j],
// summed in the order of rising e whatever the order of the choice. `experts[e]` points at packed expert e
// (formats.h).
struct ExpertLayer {
  Rows x, out;
  const uint8_t* const* experts;
  Format format;
  int64_t count, width;
  const int32_t* chosen;
  const float* weights;
  int64_t choices;
  int threads;  // that scratch has room for
  void* scratch;
};

// A weight [N, K] on its way into or out of the packed layout, its blocks `block_stride` bytes apart.
// `importance` is null or [K]: what a squared error in a column costs. `pack` says false where a weight is
// not finite or too large for the format.
struct Packing {
  Rows weight;
  const float* importance;
  uint8_t* packed;
  int64_t block_stride;
  Format format;
};

// X(result, name, arguments)
#define TENFOLD_KERNELS(X)                              \
  X(size_t, product_scratch, (const Product&))          \
  X(void, product, (const Product&))                    \
  X(size_t, expert_layer_scratch, (const ExpertLayer&)) \
  X(void, expert_layer, (const ExpertLayer&))           \
  X(bool, pack, (const Packing&))                       \
  X(void, unpack, (const Packing&))                     \
  X(uint64_t, read_memory, (const uint8_t*, size_t))

struct KernelTable {
  const char* name;
#define X(result, name, arguments) result(*name) arguments noexcept;
  TENFOLD_KERNELS(X)
#undef X
};

#define X(result, name, arguments) result name arguments noexcept;
namespace baseline {
TENFOLD_KERNELS(X)
}
namespace avx2 {
TENFOLD_KERNELS(X)
}
namespace avx512 {
TENFOLD_KERNELS(X)
}
#undef X

}  // namespace tenfold
