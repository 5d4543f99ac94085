#include "packed.h"

#include "dispatch.h"

namespace nb = nanobind;

namespace tenfold {
namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;

int64_t check_shape(Format format, int64_t rows, int64_t cols) {
  if (rows < 1 || cols < 1 || rows > kLargestSide || cols > kLargestSide || cols % kGroup != 0) {
    refuse("a packed weight needs rows and a multiple of %d columns, got [%lld, %lld]", kGroup,
           static_cast<long long>(rows), static_cast<long long>(cols));
  }
  return packed_bytes(format, rows, cols);
}

int64_t check_experts(Format format, int64_t count, int64_t hidden, int64_t width) {
  if (count < 1 || hidden < 1 || width < 1 || count > 1 << 20 || hidden > 1 << 20 || width > 1 << 20 ||
      hidden % kGroup != 0 || width % kGroup != 0) {
    refuse(
        "packed experts need a hidden size and a width that are multiples of %d, got %lld experts, %lld and "
        "%lld",
        kGroup, static_cast<long long>(count), static_cast<long long>(hidden), static_cast<long long>(width));
  }
  return count * expert_bytes(format, hidden, width);
}

const float* check_importance(const std::optional<Input>& importance, int64_t cols) {
  return importance ? contiguous<float>(*importance, {cols}, "importance", "float32") : nullptr;
}

Rows check_weight(const Input& weight, int64_t rows, int64_t cols, const char* name) {
  const Rows view = matrix(weight, name);
  if (view.rows != rows || view.cols != cols) {
    refuse("%s must be [%lld, %lld], got %s", name, static_cast<long long>(rows),
           static_cast<long long>(cols), shape_of(weight).c_str());
  }
  return view;
}

// Fills several packings, without the interpreter's lock.
void pack_all(std::initializer_list<Packing> packings) {
  bool finite = true;
  {
    const nb::gil_scoped_release release;
    for (const Packing& packing : packings) finite &= kernels().pack(packing);
  }
  require(finite, "the weight holds values that are not finite, or too large for its format");
}

Rows unpacked(const Output& out, int64_t rows, int64_t cols) {
  return {contiguous<float>(out, {rows, cols}, "out", "float32"), DType::f32, rows, cols, cols};
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
      cols_(cols),
      bytes_(static_cast<size_t>(check_shape(format, rows, cols))) {}

PackedLinear::PackedLinear(Input bytes, std::string_view format, int64_t rows, int64_t cols)
    : format_(format_named(format)),
      rows_(rows),
      cols_(cols),
      bytes_(std::move(bytes), static_cast<size_t>(check_shape(format_, rows, cols))) {}

PackedLinear PackedLinear::pack(const Input& weight, std::string_view format,
                                const std::optional<Input>& importance) {
  const Rows rows = matrix(weight, "weight");
  PackedLinear packed(format_named(format), rows.rows, rows.cols);
  pack_all({{rows, check_importance(importance, rows.cols), packed.bytes_.writable(),
             block_bytes(packed.format_, rows.cols), packed.format_}});
  return packed;
}

void PackedLinear::unpack(const Output& out) const {
  const Packing packing = {unpacked(out, rows_, cols_), nullptr, const_cast<uint8_t*>(bytes_.data()),
                           block_bytes(format_, cols_), format_};
  const nb::gil_scoped_release release;
  kernels().unpack(packing);
}

void PackedLinear::unpack_row(int64_t row, float* to) const {
  const Rows weight = {nullptr, DType::f32, rows_, cols_, cols_};
  kernels().unpack_row(
      {weight, nullptr, const_cast<uint8_t*>(bytes_.data()), block_bytes(format_, cols_), format_}, row, to);
}

PackedExperts::PackedExperts(std::string_view format, int64_t count, int64_t hidden, int64_t width)
    : format_(format_named(format)),
      count_(count),
      hidden_(hidden),
      width_(width),
      bytes_(static_cast<size_t>(check_experts(format_, count, hidden, width))) {
  memset(bytes_.writable(), 0, bytes_.size());
  point_at_experts();
}

PackedExperts::PackedExperts(Input bytes, std::string_view format, int64_t count, int64_t hidden,
                             int64_t width)
    : format_(format_named(format)),
      count_(count),
      hidden_(hidden),
      width_(width),
      bytes_(std::move(bytes), static_cast<size_t>(check_experts(format_, count, hidden, width))) {
  point_at_experts();
}

void PackedExperts::point_at_experts() {
  for (int64_t e = 0; e < count_; ++e)
    experts_.push_back(bytes_.data() + e * expert_bytes(format_, hidden_, width_));
}

// Gate, up and down of an expert in their places (formats.h).
std::array<Packing, 3> PackedExperts::packings(int64_t expert, const Rows& gate, const Rows& up,
                                               const Rows& down) const {
  if (expert < 0 || expert >= count_) {
    refuse("there are %lld experts, got number %lld", static_cast<long long>(count_),
           static_cast<long long>(expert));
  }
  auto* at = const_cast<uint8_t*>(experts_[static_cast<size_t>(expert)]);
  const int64_t block = block_bytes(format_, hidden_);
  return {{{gate, nullptr, at, 2 * block, format_},
           {up, nullptr, at + block, 2 * block, format_},
           {down, nullptr, at + 2 * packed_bytes(format_, width_, hidden_), block_bytes(format_, width_),
            format_}}};
}

void PackedExperts::pack(int64_t expert, const Input& gate, const Input& up, const Input& down,
                         const std::optional<Input>& importance,
                         const std::optional<Input>& importance_down) {
  require(bytes_.writable(), "these experts lie in memory that is not their own");
  auto [g, u, d] =
      packings(expert, check_weight(gate, width_, hidden_, "gate"), check_weight(up, width_, hidden_, "up"),
               check_weight(down, hidden_, width_, "down"));
  g.importance = u.importance = check_importance(importance, hidden_);
  d.importance = check_importance(importance_down, width_);
  pack_all({g, u, d});
}

void PackedExperts::unpack(int64_t expert, const Output& gate, const Output& up, const Output& down) const {
  const auto all = packings(expert, unpacked(gate, width_, hidden_), unpacked(up, width_, hidden_),
                            unpacked(down, hidden_, width_));
  const nb::gil_scoped_release release;
  for (const Packing& packing : all) kernels().unpack(packing);
}

}  // namespace tenfold
