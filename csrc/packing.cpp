// Weights into the packed layout of formats.h and back.
//
// Written with vectors of the compiler's own, as wide for every instruction set, and without fused
// operations, so that a model quantized on one machine has the same bytes as on any other.

#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

using Row = float __attribute__((vector_size(64)));  // half a group of one row
constexpr int kHalf = 16;

float total(const Row& x) {
  float halves[kHalf];
  memcpy(halves, &x, sizeof x);
  for (int width = kHalf / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
  }
  return halves[0];
}

// To the nearest integer; adding and taking off 1.5 * 2^23 is exact below 2^22.
Row round_row(const Row& x) { return (x + 12582912.0f) - 12582912.0f; }

Row clamp_row(const Row& x, float low, float high) {
  const Row bounded = x < low ? Row{} + low : x;
  return bounded > high ? Row{} + high : bounded;
}

uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  return read<uint16_t>(&half);
}

float from_half(uint16_t bits) { return static_cast<float>(read<_Float16>(&bits)); }

uint16_t to_bf16(float x) {
  const uint32_t bits = read<uint32_t>(&x);
  return static_cast<uint16_t>(x == x ? (bits + ((bits >> 16) & 1) + 0x7fff) >> 16 : 0x7fc0);
}

// One row's group: its values and how much an error in each matters.
struct Group {
  Row x[2], importance[2];
};

float largest(const Group& group) {  // in magnitude, with its sign
  float best = 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const float x = group.x[i / kHalf][i % kHalf];
    if (__builtin_fabsf(x) > __builtin_fabsf(best)) best = x;
  }
  return best;
}

struct Grid {
  float low, high;
};
constexpr Grid kInt8 = {-127.0f, 127.0f};
constexpr Grid kInt4 = {-8.0f, 7.0f};

struct Quants {
  Row q[2];
};

Quants quantize(const Group& group, float inverse, Grid grid) {
  Quants quants;
  for (int h = 0; h < 2; ++h) quants.q[h] = clamp_row(round_row(group.x[h] * inverse), grid.low, grid.high);
  return quants;
}

// The scale of int4: for some scales near the one that maps the largest value to -8, the group is rounded and
// the scale refitted by least squares; of these the one with the least weighted squared error wins.
float search_scale(const Group& group, float extreme) {
  constexpr int kSteps = 9;
  float best_scale = 0.0f, best_gain = 0.0f;
  for (int step = -kSteps; step <= kSteps; ++step) {
    const Quants quants = quantize(group, -(8.0f + 0.1f * static_cast<float>(step)) / extreme, kInt4);
    Row xq = {}, qq = {};
    for (int h = 0; h < 2; ++h) {
      const Row weighted = group.importance[h] * quants.q[h];
      xq += weighted * group.x[h], qq += weighted * quants.q[h];
    }
    const float product = total(xq), square = total(qq);
    if (square > 0.0f && product * product > best_gain * square) {
      best_scale = product / square;
      best_gain = product * best_scale;
    }
  }
  return best_scale;
}

// Quantizes one row's group; returns its scale's bits.
uint16_t quantize_group(const Group& group, Format format, int8_t (&quants)[kGroup]) {
  const float extreme = largest(group);
  const bool tiny = __builtin_fabsf(extreme) < 1e-30f;
  const float ideal = tiny                     ? 0.0f
                      : format == Format::int8 ? __builtin_fabsf(extreme) / 127.0f
                                               : search_scale(group, extreme);
  const uint16_t bits = to_half(ideal);
  const float scale = from_half(bits);
  const Quants rounded =
      quantize(group, scale != 0.0f ? 1.0f / scale : 0.0f, format == Format::int8 ? kInt8 : kInt4);
  for (int i = 0; i < kGroup; ++i) quants[i] = static_cast<int8_t>(rounded.q[i / kHalf][i % kHalf]);
  return bits;
}

void load_group(const Packing& packing, int64_t row, int64_t col, float (&x)[kGroup]) {
  const int64_t at = row * packing.weight.stride + col;
  if (packing.weight.dtype == DType::f32) {
    memcpy(x, static_cast<const float*>(packing.weight.data) + at, sizeof x);
  } else {
    const bf16* from = static_cast<const bf16*>(packing.weight.data) + at;
    for (int i = 0; i < kGroup; ++i) x[i] = to_float(from[i]);
  }
}

bool all_finite(const float (&x)[kGroup], float limit) {
  bool finite = true;
  for (const float value : x) finite &= __builtin_fabsf(value) <= limit;
  return finite;
}

void put_bf16(const float (&x)[kGroup], uint8_t* group, int row) {
  for (int i = 0; i < kGroup; ++i) {
    const uint16_t bits = to_bf16(x[i]);
    memcpy(group + i / 2 * kLineBytes + 4 * row + i % 2 * 2, &bits, sizeof bits);
  }
}

// Where column i of an int8 or int4 group lies: in which line and byte of it, and for int4 in which nibble.
struct Place {
  int byte, shift;
};

Place place(Format format, int row, int i) {
  const int quad = i / 4;
  const int line = format == Format::int8 ? quad : quad / 2;
  return {scale_bytes(format) + line * kLineBytes + 4 * row + i % 4,
          format == Format::int8 ? 0 : quad % 2 * 4};
}

void put_quants(const int8_t (&quants)[kGroup], Format format, uint8_t* group, int row) {
  for (int i = 0; i < kGroup; ++i) {
    const Place at = place(format, row, i);
    const int bits = format == Format::int8 ? static_cast<uint8_t>(quants[i]) : (quants[i] + 8) << at.shift;
    group[at.byte] = static_cast<uint8_t>((at.shift ? group[at.byte] : 0) | bits);
  }
}

int take_quant(Format format, const uint8_t* group, int row, int i) {
  const Place at = place(format, row, i);
  return format == Format::int8 ? static_cast<int8_t>(group[at.byte])
                                : ((group[at.byte] >> at.shift) & 15) - 8;
}

// Rows that fill up the last block have a scale of 0 (for bf16, values of 0).
bool pack_group(const Packing& packing, int64_t row, int64_t col, uint8_t* group) {
  float x[kGroup] = {};
  const bool inside = row < packing.weight.rows;
  if (inside) load_group(packing, row, col, x);
  const int within = static_cast<int>(row % kBlockRows);
  if (packing.format == Format::bf16) {
    put_bf16(x, group, within);
    return all_finite(x, 3.3895e38f);
  }
  Group values;
  float importance[kGroup];
  for (int i = 0; i < kGroup; ++i) importance[i] = packing.importance ? packing.importance[col + i] : 1.0f;
  memcpy(values.x, x, sizeof x);
  memcpy(values.importance, importance, sizeof importance);
  int8_t quants[kGroup];
  const uint16_t scale = quantize_group(values, packing.format, quants);
  memcpy(group + 2 * within, &scale, sizeof scale);
  put_quants(quants, packing.format, group, within);
  return all_finite(x, 65504.0f);
}

bool pack_block(const Packing& packing, int64_t block) {
  uint8_t* group = packing.packed + block * packing.block_stride;
  bool finite = true;
  for (int64_t col = 0; col < packing.weight.cols; col += kGroup, group += group_bytes(packing.format)) {
    for (int64_t row = block * kBlockRows; row < (block + 1) * kBlockRows; ++row) {
      finite &= pack_group(packing, row, col, group);
    }
  }
  return finite;
}

float weight_at(Format format, const uint8_t* group, int row, int i) {
  if (format == Format::bf16) return to_float(read<bf16>(group + i / 2 * kLineBytes + 4 * row + i % 2 * 2));
  return from_half(read<uint16_t>(group + 2 * row)) * static_cast<float>(take_quant(format, group, row, i));
}

void unpack_row(const Packing& packing, int64_t row) {
  const int64_t block = row / kBlockRows;
  const uint8_t* group = packing.packed + block * packing.block_stride;
  float* to = static_cast<float*>(packing.weight.data) + row * packing.weight.stride;
  for (int64_t col = 0; col < packing.weight.cols; col += kGroup, group += group_bytes(packing.format)) {
    for (int i = 0; i < kGroup; ++i) {
      to[col + i] = weight_at(packing.format, group, static_cast<int>(row % kBlockRows), i);
    }
  }
}

}  // namespace

bool pack(const Packing& packing) noexcept {
  bool finite = true;
  parallel_for(blocks(packing.weight.rows), [&](int64_t block, int) {
    if (!pack_block(packing, block)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

void unpack(const Packing& packing) noexcept {
  parallel_for(packing.weight.rows, [&](int64_t row, int) { unpack_row(packing, row); });
}

}  // namespace tenfold::TENFOLD_ISA
