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
struct half {
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

// The sequences of a step; their tokens stand end to end. Sequence n has rows bounds[n] .. bounds[n + 1] - 1,
// its recurrent state in slot slots[n], and past[n] earlier tokens in the pages that pages[n] lists. The states
// after its last saved[n] tokens also go to the slots that saves[n] lists.
struct Sequences {
  int64_t count;
  const int64_t *bounds, *slots, *past;
  const int32_t* const* pages;
  const int64_t* saved;
  const int64_t* const* saves;
};

constexpr int64_t kMostConvWidth = 8;
constexpr int64_t kMostHeadDim = 512;  // of attention

// Gated DeltaNet between its two projections: short conv, gates, delta rule and gated norm. Key head h has
// [q K, k K, v R V, z R V] in a row of qkvz and [b R, a R] in one of ba, for its R value heads; so has it
// conv_weight [H, W, 2 K + R V]. The states, conv [slots, C, W - 1] and recurrent [slots, H R, V, K], advance
// in place.
struct DeltaNet {
  Rows qkvz, ba, out;
  Sequences sequences;
  int64_t key_heads, shared, key_dim, value_dim, conv_width;
  const float *conv_weight, *rate, *dt_bias, *norm_weight;  // rate = -exp(A_log)
  float eps;
  float *conv_state, *state;
  int threads;  // that scratch has room for
  void* scratch;
};

enum class CacheType : uint8_t { f32, bf16, f16, int8 };

// One layer's keys and values in pages. Keys are [G, pages, K, page], so that lanes are tokens; values
// [G, pages, page, K]. In bf16 and int8 pairs of what is summed over stand together, keys [G, pages, K / 2, page,
// 2], values [G, pages, page / 2, K, 2]; in int8 each token of each head has a scale [G, pages, page].
struct PagedCache {
  void *keys, *values;
  float *key_scales, *value_scales;
  CacheType type;
  int64_t kv_heads, pages, dim, page;
};

// What attention leaves behind: norm and rotation of keys, and their place and that of values in the cache. cos and
// sin are [T, rotated / 2].
struct KeysAndValues {
  Rows k, v;
  Sequences sequences;
  PagedCache cache;
  const float* k_norm;
  float eps;
  const float *cos, *sin;
  int64_t rotated;
  int threads;
};

// Attention between its two projections: keys and values as above, norm and rotation of queries, causal attention
// over the cache, output gate. A head has [q K, gate K] in a row of q if gated, else [q K]; scratch has room for
// `threads`.
struct Attention : KeysAndValues {
  Rows q, out;
  int64_t heads;
  bool gated;
  const float* q_norm;
  void* scratch;
};

// x += delta where there is one, then out = x / sqrt(mean(x^2) + eps) * weight.
struct RmsNorm {
  Rows x, out;
  const Rows* delta;
  const float* weight;
  float eps;
};

// Softmax over all experts, the `choices` largest in falling order, the lower number first where two are
// equal. With a shared gate every token chooses `shared` experts more, numbers E and up, by the gate's sigmoid.
struct Router {
  Rows logits;
  const Rows* shared_gate;
  int64_t choices, shared;
  bool normalize;
  int32_t* chosen;
  float* weights;
};

struct SwiGlu {
  Rows gate, up, out;
};

// What `multiply_in_registers` multiplies, and how: as products with weights of these formats do, or in fp32. It says
// how many products it has added up.
enum class Multiplier : uint8_t { f32, bf16, int16, int8, int4 };

// X(result, name, arguments)
#define TENFOLD_KERNELS(X)                               \
  X(size_t, product_scratch, (const Product&))           \
  X(void, product, (const Product&))                     \
  X(size_t, expert_layer_scratch, (const ExpertLayer&))  \
  X(void, expert_layer, (const ExpertLayer&))            \
  X(size_t, delta_net_scratch, (const DeltaNet&))        \
  X(void, delta_net, (const DeltaNet&))                  \
  X(void, remember, (const KeysAndValues&))              \
  X(size_t, attention_scratch, (const Attention&))       \
  X(void, attention, (const Attention&))                 \
  X(void, rms_norm, (const RmsNorm&))                    \
  X(void, route, (const Router&))                        \
  X(void, swiglu, (const SwiGlu&))                       \
  X(bool, pack, (const Packing&))                        \
  X(void, unpack, (const Packing&))                      \
  X(void, unpack_row, (const Packing&, int64_t, float*)) \
  X(uint64_t, read_memory, (const uint8_t*, size_t))     \
  X(int64_t, multiply_in_registers, (Multiplier))

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
namespace avxvnni {
TENFOLD_KERNELS(X)
}
namespace avx512 {
TENFOLD_KERNELS(X)
}
#undef X

}  // namespace tenfold
