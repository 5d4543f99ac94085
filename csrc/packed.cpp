#include "packed.h"

#include "dispatch.h"

namespace nb = nanobind;

namespace tenfold {
namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;

void check_shape(int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || rows > kLargestSide || cols > kLargestSide || cols % kGroup != 0) {
    refuse("a packed weight needs rows and a multiple of %d columns, got [%lld, %lld]", kGroup,
           static_cast<long long>(rows), static_cast<long long>(cols));
  }
}

const float* check_importance(const std::optional<Input>& importance, int64_t cols) {
  return importance ? contiguous<float>(*importance, {cols}, "importance", "float32") : nullptr;
}

void pack_into(const Rows& weight, const float* importance, Format format, uint8_t* packed) {
  const Packing packing = {weight, importance, packed, format};
  bool finite;
  {
    const nb::gil_scoped_release release;
    finite = kernels().pack(packing);
  }
  require(finite, "the weight holds values that are not finite, or too large for its format");
}

}  // namespace

Format format_named(std::string_view name) {
  for (const Format format : {Format::bf16, Format::int8, Format::int4}) {
    if (name == name_of(format)) return format;
  }
  refuse("unknown format '%s': bf16, int8 or int4", std::string(name).c_str());
}

const char* name_of(Format format) {
  return format == Format::bf16 ? "bf16" : format == Format::int8 ? "int8" : "int4";
}

PackedBytes::PackedBytes(Input array, size_t size)
    : array_(std::move(array)), data_(static_cast<const uint8_t*>(array_.data())), size_(size) {
  contiguous<uint8_t>(array_, {static_cast<int64_t>(size)}, "packed bytes", "uint8");
  require(reinterpret_cast<uintptr_t>(data_) % 64 == 0, "packed bytes must be aligned to 64");
}

PackedLinear::PackedLinear(Format format, int64_t rows, int64_t cols)
    : format_(format),
      rows_(rows),
      cols_((check_shape(rows, cols), cols)),
      bytes_(static_cast<size_t>(packed_bytes(format, rows, cols))) {}

PackedLinear::PackedLinear(Input bytes, std::string_view format, int64_t rows, int64_t cols)
    : format_(format_named(format)),
      rows_(rows),
      cols_((check_shape(rows, cols), cols)),
      bytes_(std::move(bytes), static_cast<size_t>(packed_bytes(format_, rows, cols))) {}

PackedLinear PackedLinear::pack(const Input& weight, std::string_view format,
                                const std::optional<Input>& importance) {
  const Rows rows = matrix(weight, "weight");
  PackedLinear packed(format_named(format), rows.rows, rows.cols);
  pack_into(rows, check_importance(importance, rows.cols), packed.format_, packed.bytes_.writable());
  return packed;
}

void PackedLinear::unpack(const Output& out) const {
  float* to = contiguous<float>(out, {rows_, cols_}, "out", "float32");
  const nb::gil_scoped_release release;
  kernels().unpack(
      {{to, DType::f32, rows_, cols_, cols_}, nullptr, const_cast<uint8_t*>(bytes_.data()), format_});
}

}  // namespace tenfold
