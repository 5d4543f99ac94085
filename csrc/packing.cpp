// Weights into the packed layout of formats.h and back.
//
// No operations are fused, and `sum` adds lanes in one order whatever their number: a model quantized on one machine
// has the same bytes as on any other.

#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int kParts = kGroup / kLanes;

// 32 values: a group of one row.
struct Row {
  F32 part[kParts];
};

template <class F>
TENFOLD_INLINE Row map(const F& value) {
  Row row;
  unrolled<kParts>([&](auto i) TENFOLD_BODY { row.part[i] = value(i); });
  return row;
}

// Halves are added up until one value is left.
TENFOLD_INLINE float total(Row row) {
  for (int count = kParts / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) row.part[i] = row.part[i] + row.part[i + count];
  }
  return sum(row.part[0]);
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

TENFOLD_INLINE F32 nearest_int8(F32 x) { return max(splat(-127), min(splat(127), round(x))); }

// The nearest number of the grid: its first, and the step to the next for every middle of two that x is beyond.
TENFOLD_INLINE F32 nearest_int4(F32 x) {
  F32 nearest = splat(kInt4Grid[0]);
  unrolled<15>([&](auto i) TENFOLD_BODY {
    const float low = kInt4Grid[i], high = kInt4Grid[i + 1];
    nearest = nearest + (x > splat((low + high) * 0.5f) ? splat(high - low) : splat(0));
  });
  return nearest;
}

TENFOLD_INLINE Row quantize(const Row& x, float inverse, Format format) {
  return map([&](auto i) TENFOLD_BODY {
    const F32 scaled = x.part[i] * splat(inverse);
    return format == Format::int8 ? nearest_int8(scaled) : nearest_int4(scaled);
  });
}

// The scale of int4: for some that bring the largest value near either end of the grid, the group is rounded and the
// scale refitted by least squares; of these the one with the least weighted squared error wins.
float search_scale(const Row& x, const Row& importance, float magnitude) {
  constexpr float kReach[] = {-1.06f, -0.99f, -0.92f, -0.85f, 0.85f, 0.92f, 0.99f, 1.06f};
  float best_scale = 0.0f, best_gain = 0.0f;
  for (const float reach : kReach) {
    const Row q = quantize(x, kInt4Grid[15] * reach / magnitude, Format::int4);
    const Row weighted = map([&](auto i) TENFOLD_BODY { return importance.part[i] * q.part[i]; });
    const float xq = total(map([&](auto i) TENFOLD_BODY { return weighted.part[i] * x.part[i]; }));
    const float qq = total(map([&](auto i) TENFOLD_BODY { return weighted.part[i] * q.part[i]; }));
    if (qq > 0.0f && xq * xq > best_gain * qq) {
      best_scale = xq / qq;
      best_gain = xq * best_scale;
    }
  }
  return best_scale;
}

float largest(const Row& x) {
  uint32_t bits = 0;
  for (int i = 0; i < kParts; i += 2) {
    const uint32_t magnitude = largest_magnitude(x.part[i], x.part[i + 1]);
    bits = magnitude > bits ? magnitude : bits;
  }
  return read<float>(&bits);
}

// Quantizes one row's group; returns its scale's bits.
uint16_t quantize_group(const float (&values)[kGroup], const float* importance, Format format,
                        int8_t (&quants)[kGroup]) {
  const Row x = map([&](auto i) TENFOLD_BODY { return load(values + i * kLanes); });
  const float magnitude = largest(x);
  float ideal = 0.0f;
  if (magnitude > 1e-30f && format == Format::int8) {
    ideal = magnitude / 127.0f;
  } else if (magnitude > 1e-30f) {
    const Row costs =
        map([&](auto i) TENFOLD_BODY { return importance ? load(importance + i * kLanes) : splat(1.0f); });
    ideal = search_scale(x, costs, magnitude);
  }
  const uint16_t bits = to_half(ideal);
  const float scale = from_half(bits);
  const Row rounded = quantize(x, scale != 0.0f ? 1.0f / scale : 0.0f, format);
  for (int i = 0; i < kParts; ++i) store_int8(quants + i * kLanes, rounded.part[i]);
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

struct GridPlaces {
  int8_t of[33] = {};  // number + 16
  constexpr GridPlaces() {
    for (int8_t i = 0; i < 16; ++i) of[kInt4Grid[i] + 16] = i;
  }
};

void put_quants(const int8_t (&quants)[kGroup], Format format, uint8_t* group, int row) {
  static constexpr GridPlaces kPlaces;
  for (int i = 0; i < kGroup; ++i) {
    const Place at = place(format, row, i);
    const int bits =
        format == Format::int8 ? static_cast<uint8_t>(quants[i]) : kPlaces.of[quants[i] + 16] << at.shift;
    group[at.byte] = static_cast<uint8_t>((at.shift ? group[at.byte] : 0) | bits);
  }
}

int take_quant(Format format, const uint8_t* group, int row, int i) {
  const Place at = place(format, row, i);
  return format == Format::int8 ? static_cast<int8_t>(group[at.byte])
                                : kInt4Grid[group[at.byte] >> at.shift & 15];
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
  int8_t quants[kGroup];
  const float* importance = packing.importance ? packing.importance + col : nullptr;
  const uint16_t scale = quantize_group(x, importance, packing.format, quants);
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

}  // namespace

void unpack_row(const Packing& packing, int64_t row, float* to) noexcept {
  const int64_t block = row / kBlockRows;
  const uint8_t* group = packing.packed + block * packing.block_stride;
  for (int64_t col = 0; col < packing.weight.cols; col += kGroup, group += group_bytes(packing.format)) {
    for (int i = 0; i < kGroup; ++i) {
      to[col + i] = weight_at(packing.format, group, static_cast<int>(row % kBlockRows), i);
    }
  }
}

bool pack(const Packing& packing) noexcept {
  bool finite = true;
  parallel_for(blocks(packing.weight.rows), [&](int64_t block, int) {
    if (!pack_block(packing, block)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

void unpack(const Packing& packing) noexcept {
  parallel_for(packing.weight.rows, [&](int64_t row, int) {
    unpack_row(packing, row, static_cast<float*>(packing.weight.data) + row * packing.weight.stride);
  });
}

}  // namespace tenfold::TENFOLD_ISA
