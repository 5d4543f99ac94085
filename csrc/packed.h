// Packed weights as Python holds them.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arrays.h"
#include "memory.h"

namespace tenfold {

Format format_named(std::string_view name);
const char* name_of(Format format);

// Packed bytes: its own, or part of an array that it keeps alive, as of a memory-mapped file.
class PackedBytes {
 public:
  explicit PackedBytes(size_t size) : own_(allocate(size)), data_(own_.get()), size_(size) {}
  PackedBytes(Input array, size_t size);

  uint8_t* writable() { return own_.get(); }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Memory own_;
  Input array_;
  const uint8_t* data_;
  size_t size_;
};

// A weight [N, K] for `linear`.
class PackedLinear {
 public:
  PackedLinear(Input bytes, std::string_view format, int64_t rows, int64_t cols);
  static PackedLinear pack(const Input& weight, std::string_view format,
                           const std::optional<Input>& importance);

  PackedMatrix view() const { return {bytes_.data(), format_, rows_, cols_}; }
  void unpack(const Output& out) const;
  void unpack_row(int64_t row, float* to) const;

  Format format() const { return format_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  const PackedBytes& bytes() const { return bytes_; }

 private:
  PackedLinear(Format format, int64_t rows, int64_t cols);

  Format format_;
  int64_t rows_, cols_;
  PackedBytes bytes_;
};

// The experts of a layer, for `expert_layer`, one after another.
class PackedExperts {
 public:
  PackedExperts(std::string_view format, int64_t count, int64_t hidden, int64_t width);
  PackedExperts(Input bytes, std::string_view format, int64_t count, int64_t hidden, int64_t width);

  // `importance`: of the columns of gate and up, and of down's.
  void pack(int64_t expert, const Input& gate, const Input& up, const Input& down,
            const std::optional<Input>& importance, const std::optional<Input>& importance_down);
  void unpack(int64_t expert, const Output& gate, const Output& up, const Output& down) const;

  const uint8_t* const* experts() const { return experts_.data(); }
  Format format() const { return format_; }
  int64_t count() const { return count_; }
  int64_t hidden() const { return hidden_; }
  int64_t width() const { return width_; }
  const PackedBytes& bytes() const { return bytes_; }

 private:
  void point_at_experts();
  std::array<Packing, 3> packings(int64_t expert, const Rows& gate, const Rows& up, const Rows& down) const;

  Format format_;
  int64_t count_, hidden_, width_;
  PackedBytes bytes_;
  std::vector<const uint8_t*> experts_;
};

}  // namespace tenfold
