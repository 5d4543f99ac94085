// The layout of packed weights, the same for every instruction set, in memory and on disk (little endian).
//
// A weight [N, K], K a multiple of 32, is cut into blocks of 32 rows; the last block is filled up with zero rows.
// A block is K / 32 groups, one after another. A group, 32 rows by 32 columns, is its scales, if the format has
// any, then lines:
//
//   scales   fp16 [32]: one per row
//   line     128 bytes: 4 bytes for each of the 32 rows, the bytes of row r at 4 r
//
//   format   scales   lines   the 4 bytes of row r in line i                             bits per weight
//   bf16     -        16      columns 2i, 2i + 1                                         16
//   int8     yes      8       columns 4i .. 4i + 3, two's complement, -127 .. 127        8.5
//   int4     yes      4       low nibbles columns 8i .. 8i + 3, high 8i + 4 .. 8i + 7    4.5
//
// A nibble of int4 is a place in kInt4Grid.
//
// So a vector register of any width takes 4 bytes from each of its rows, next to each other, and the dot products
// of its rows with one input come out in its lanes: nothing is ever summed across lanes. A group is a whole number
// of cache lines in each format.
//
// A packed expert is gate, up [F, D] and down [D, F]. The blocks of gate and up alternate (gate 0, up 0, gate 1,
// ...), so that 32 activations of SwiGLU, a group of down's input, come from 2 neighbouring blocks; the blocks of
// down follow. An expert is filled up to a multiple of 4 KiB, the unit of direct reads from a disk.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tenfold {

enum class Format : uint8_t { bf16, int8, int4 };

// Weights are spread like a bell, so the grid is finer near zero: a tenth less squared error than even steps on
// normal weights, a quarter less where tails are heavy; found by a search over both. None is above 16, so that
// the products of 16 of them with bytes can be summed in 16 bits.
constexpr int8_t kInt4Grid[16] = {-16, -13, -10, -8, -6, -4, -2, -1, 0, 1, 3, 5, 7, 9, 12, 16};

constexpr int kBlockRows = 32;
constexpr int kGroup = 32;
constexpr int kLineBytes = 4 * kBlockRows;
constexpr int64_t kExpertAlignment = 4096;

constexpr int scale_bytes(Format format) { return format == Format::bf16 ? 0 : 2 * kBlockRows; }

constexpr int lines(Format format) { return format == Format::bf16 ? 16 : format == Format::int8 ? 8 : 4; }

constexpr int64_t group_bytes(Format format) { return scale_bytes(format) + lines(format) * kLineBytes; }

constexpr int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

constexpr int64_t block_bytes(Format format, int64_t cols) { return cols / kGroup * group_bytes(format); }

constexpr int64_t packed_bytes(Format format, int64_t rows, int64_t cols) {
  return blocks(rows) * block_bytes(format, cols);
}

constexpr int64_t expert_bytes(Format format, int64_t hidden, int64_t width) {
  const int64_t used = 2 * packed_bytes(format, width, hidden) + packed_bytes(format, hidden, width);
  return (used + kExpertAlignment - 1) / kExpertAlignment * kExpertAlignment;
}

}  // namespace tenfold
