#include "layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tenfold {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 40;

long long number(int64_t x) { return x; }

void require_sixteens(int64_t dim, const char* name) {
  if (dim < 16 || dim % 16) refuse("%s must be a multiple of 16, got %lld", name, number(dim));
}

// An fp32 copy of a contiguous array of fp32 or bf16.
std::vector<float> floats(const Input& array, std::initializer_list<int64_t> shape, const char* name) {
  if (float_type(array) != DType::bf16) {
    const float* from = contiguous<float>(array, shape, name, "float32 or bfloat16");
    return {from, from + array.size()};
  }
  const bf16* from = contiguous_bf16(array, shape, name);
  std::vector<float> values(array.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    memcpy(&values[i], &bits, sizeof bits);
  }
  return values;
}

void require_dims(const Input& array, size_t dims, const char* name, const char* meaning) {
  if (array.ndim() != dims) refuse("%s must be %s, got shape %s", name, meaning, shape_of(array).c_str());
}

CacheType cache_type(const Output& array) {
  const std::optional<DType> type = float_type(array);
  const nanobind::dlpack::dtype f16 = {static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float), 16, 1};
  if (type) return *type == DType::f32 ? CacheType::f32 : CacheType::bf16;
  if (array.dtype() == f16) return CacheType::f16;
  if (array.dtype() != nanobind::dtype<int8_t>()) {
    refuse("keys and values must be float32, bfloat16, float16 or int8");
  }
  return CacheType::int8;
}

void* page_data(const Output& array, std::initializer_list<int64_t> shape, const char* name) {
  switch (cache_type(array)) {
    case CacheType::f32: return contiguous<float>(array, shape, name, "float32");
    case CacheType::bf16: return contiguous_bf16(array, shape, name);
    case CacheType::f16: return contiguous_of(array, array.dtype(), shape, name, "float16");
    case CacheType::int8: return contiguous<int8_t>(array, shape, name, "int8");
  }
  return nullptr;
}

}  // namespace

Rotation::Rotation(Input cos, Input sin) : cos_array_(std::move(cos)), sin_array_(std::move(sin)) {
  require_dims(cos_array_, 2, "cos", "[positions, rotated / 2]");
  cos_ = contiguous<float>(cos_array_, {positions(), half()}, "cos", "float32");
  sin_ = contiguous<float>(sin_array_, {positions(), half()}, "sin", "float32");
}

Batch::Batch(std::vector<int64_t> bounds, std::optional<std::vector<int64_t>> slots,
             std::optional<std::vector<int64_t>> past, std::optional<std::vector<Input>> pages,
             const Rotation* rotation, std::optional<std::vector<std::vector<int64_t>>> saves)
    : bounds_(std::move(bounds)),
      slots_(std::move(slots).value_or(std::vector<int64_t>())),
      past_(std::move(past).value_or(std::vector<int64_t>())) {
  require(!bounds_.empty() && bounds_[0] == 0 && bounds_.back() < kMostTokens, "bounds must rise from 0");
  for (size_t i = 1; i < bounds_.size(); ++i)
    require(bounds_[i] > bounds_[i - 1], "bounds must rise strictly");
  take_pages(pages ? *pages : std::vector<Input>());
  take_saves(std::move(saves).value_or(std::vector<std::vector<int64_t>>(bounds_.size() - 1)));
  if (rotation) take_rotation(*rotation);
}

void Batch::take_pages(const std::vector<Input>& pages) {
  require(past_.size() == pages.size(), "past and pages must name the same sequences");
  for (const int64_t past : past_) {
    if (past < 0 || past > kMostTokens) refuse("past must not be negative, got %lld", number(past));
  }
  for (const Input& array : pages) {
    const auto count = static_cast<int64_t>(array.size());
    const auto* table = contiguous<int32_t>(array, {count}, "pages", "int32");
    pages_.emplace_back(table, table + count);
  }
  for (const std::vector<int32_t>& table : pages_) page_tables_.push_back(table.data());
}

void Batch::take_saves(std::vector<std::vector<int64_t>> saves) {
  saves_ = std::move(saves);
  require(static_cast<int64_t>(saves_.size()) == count(), "saves must name every sequence");
  for (size_t n = 0; n < saves_.size(); ++n) {
    if (static_cast<int64_t>(saves_[n].size()) > bounds_[n + 1] - bounds_[n]) {
      refuse("sequence %zu of %lld tokens has no %zu states to save", n, number(bounds_[n + 1] - bounds_[n]),
             saves_[n].size());
    }
    saved_.push_back(static_cast<int64_t>(saves_[n].size()));
    save_tables_.push_back(saves_[n].data());
  }
}

void Batch::take_rotation(const Rotation& rotation) {
  const int64_t half = rotation.half();
  for (size_t n = 0; n < past_.size(); ++n) {
    const int64_t end = past_[n] + bounds_[n + 1] - bounds_[n];
    if (end > rotation.positions()) {
      refuse("sequence %zu has %lld tokens, cos and sin %lld positions", n, number(end),
             number(rotation.positions()));
    }
    const auto take = [&](const float* table, std::vector<float>& rows) {
      rows.insert(rows.end(), table + past_[n] * half, table + end * half);
    };
    take(rotation.cos(), cos_), take(rotation.sin(), sin_);
  }
  rotated_ = 2 * half;
}

Sequences Batch::view() const {
  return {count(),       bounds_.data(),     slots_.data(), past_.data(), page_tables_.data(),
          saved_.data(), save_tables_.data()};
}

void Batch::require_slots(int64_t slots) const {
  if (checked_slots_ == slots) return;
  check_slots(slots);
  checked_slots_ = slots;
}

void Batch::check_slots(int64_t slots) const {
  if (static_cast<int64_t>(slots_.size()) != count()) {
    refuse("the batch has %lld sequences and %zu slots", number(count()), slots_.size());
  }
  std::vector<int64_t> sorted = slots_;
  for (size_t n = 0; n < saves_.size(); ++n) {
    sorted.insert(sorted.end(), saves_[n].begin(), saves_[n].end());
    if (!saves_[n].empty() && saves_[n].back() == slots_[n]) sorted.pop_back();  // it is there anyway
  }
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) {
    if (sorted[i] < 0 || sorted[i] >= slots) {
      refuse("there are %lld slots, got number %lld", number(slots), number(sorted[i]));
    }
    if (i && sorted[i] == sorted[i - 1]) refuse("two states share slot %lld", number(sorted[i]));
  }
}

void Batch::require_pages(int64_t size, int64_t pages) const {
  if (checked_size_ == size && checked_pages_ == pages) return;
  check_pages(size, pages);
  checked_size_ = size, checked_pages_ = pages;
}

int64_t Batch::pages_needed(size_t sequence, int64_t size) const {
  return (past_[sequence] + bounds_[sequence + 1] - bounds_[sequence] + size - 1) / size;
}

void Batch::check_pages(int64_t size, int64_t pages) const {
  if (static_cast<int64_t>(pages_.size()) != count()) {
    refuse("the batch has %lld sequences and %zu lists of pages", number(count()), pages_.size());
  }
  std::vector<uint8_t> uses(static_cast<size_t>(pages));  // 2 means more than one
  for (size_t n = 0; n < pages_.size(); ++n) {
    const int64_t needed = pages_needed(n, size);
    if (static_cast<int64_t>(pages_[n].size()) < needed) {
      refuse("sequence %zu of %lld tokens needs %lld pages, got %zu", n,
             number(past_[n] + bounds_[n + 1] - bounds_[n]), number(needed), pages_[n].size());
    }
    for (int64_t i = 0; i < needed; ++i) {
      const int32_t page = pages_[n][i];
      if (page < 0 || page >= pages) refuse("there are %lld pages, got number %d", number(pages), page);
      if (uses[page] < 2) ++uses[page];
    }
  }
  for (size_t n = 0; n < pages_.size(); ++n) {
    for (int64_t i = past_[n] / size; i < pages_needed(n, size); ++i) {
      if (uses[pages_[n][i]] > 1) refuse("page %d is written and used more than once", pages_[n][i]);
    }
  }
}

NormWeight::NormWeight(const Input& weight, float eps, bool zero_centered) : eps_(eps) {
  require_dims(weight, 1, "weight", "a vector");
  scale_ = floats(weight, {static_cast<int64_t>(weight.shape(0))}, "weight");
  require_sixteens(dim(), "the norm's dimension");
  if (zero_centered) {
    for (float& w : scale_) w += 1.0f;
  }
}

DeltaNetWeights::DeltaNetWeights(const Input& conv_weight, const Input& A_log, const Input& dt_bias,
                                 const Input& norm_weight, int64_t key_heads, float eps) {
  require_dims(conv_weight, 2, "conv_weight", "[channels, width]");
  require_dims(A_log, 1, "A_log", "a vector");
  require_dims(norm_weight, 1, "norm_weight", "a vector");
  const auto channels = static_cast<int64_t>(conv_weight.shape(0));
  const auto width = static_cast<int64_t>(conv_weight.shape(1));
  const auto heads = static_cast<int64_t>(A_log.shape(0)), dim = static_cast<int64_t>(norm_weight.shape(0));
  if (key_heads < 1 || heads < 1 || heads % key_heads) {
    refuse("value heads must be a multiple of key heads, got %lld and %lld", number(heads),
           number(key_heads));
  }
  if (width < 1 || width > kMostConvWidth) {
    refuse("the conv's width must be 1 to %lld, got %lld", number(kMostConvWidth), number(width));
  }
  const int64_t keys = channels - heads * dim;
  if (keys < 1 || keys % (2 * key_heads)) {
    refuse("conv_weight has %lld channels: too few or no even share for queries and keys beside %lld values",
           number(channels), number(heads * dim));
  }
  require_sixteens(keys / (2 * key_heads), "the key dimension");
  require_sixteens(dim, "the value dimension");
  shape_.key_heads = key_heads, shape_.shared = heads / key_heads, shape_.conv_width = width,
  shape_.eps = eps;
  shape_.key_dim = keys / (2 * key_heads), shape_.value_dim = dim;
  by_key_head(floats(conv_weight, {channels, width}, "conv_weight"));
  rate_ = floats(A_log, {heads}, "A_log");
  for (float& rate : rate_) rate = -std::exp(rate);
  dt_bias_ = floats(dt_bias, {heads}, "dt_bias");
  norm_weight_ = floats(norm_weight, {dim}, "norm_weight");
}

// From [C, W], all queries, all keys, all values, to [H, W, q, k and v of a key head].
void DeltaNetWeights::by_key_head(const std::vector<float>& conv_weight) {
  const int64_t key = shape_.key_dim, values = shape_.shared * shape_.value_dim, width = shape_.conv_width;
  const int64_t keys = shape_.key_heads * key;
  conv_weight_.reserve(conv_weight.size());
  for (int64_t h = 0; h < shape_.key_heads; ++h) {
    for (int64_t tap = 0; tap < width; ++tap) {
      const auto copy = [&](int64_t first, int64_t count) {
        for (int64_t c = first; c < first + count; ++c) conv_weight_.push_back(conv_weight[c * width + tap]);
      };
      copy(h * key, key);
      copy(keys + h * key, key);
      copy(2 * keys + h * values, values);
    }
  }
}

DeltaNet DeltaNetWeights::view() const {
  DeltaNet layer = shape_;
  layer.conv_weight = conv_weight_.data(), layer.rate = rate_.data();
  layer.dt_bias = dt_bias_.data(), layer.norm_weight = norm_weight_.data();
  return layer;
}

RecurrentStates::RecurrentStates(Output conv, Output recurrent)
    : conv_(std::move(conv)), recurrent_(std::move(recurrent)) {
  require(conv_.ndim() == 3, "conv must be [slots, channels, width - 1]");
  require(recurrent_.ndim() == 4, "recurrent must be [slots, value heads, value dim, key dim]");
}

void RecurrentStates::place(const DeltaNetWeights& weights, DeltaNet& layer) const {
  layer.conv_state = contiguous<float>(conv_, {slots(), weights.conv_channels(), layer.conv_width - 1},
                                       "the conv state", "float32");
  layer.state =
      contiguous<float>(recurrent_, {slots(), weights.value_heads(), layer.value_dim, layer.key_dim},
                        "the recurrent state", "float32");
}

KeyValuePages::KeyValuePages(Output keys, Output values, std::optional<Output> key_scales,
                             std::optional<Output> value_scales)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      key_scales_(std::move(key_scales)),
      value_scales_(std::move(value_scales)) {
  view_.type = cache_type(keys_);
  const bool scaled = view_.type == CacheType::int8, pairs = scaled || view_.type == CacheType::bf16;
  require(keys_.ndim() == (pairs ? 5 : 4),
          pairs ? "int8 and bfloat16 keys must be [heads, pages, head dim / 2, page size, 2]"
                : "keys must be [heads, pages, head dim, page size]");
  const auto heads = static_cast<int64_t>(keys_.shape(0)), size = static_cast<int64_t>(keys_.shape(3));
  const int64_t dim = static_cast<int64_t>(keys_.shape(2)) * (pairs ? 2 : 1);
  require(heads >= 1, "keys must have one head at least");
  if (size != 16 && size != 32 && size != 64)
    refuse("a page must have 16, 32 or 64 tokens, got %lld", number(size));
  require_sixteens(dim, "the head dimension");
  if (dim > kMostHeadDim) refuse("the head dimension must be at most %lld", number(kMostHeadDim));
  require(keys_.dtype() == values_.dtype(), "keys and values must have the same dtype");
  if (pairs) {
    view_.keys = page_data(keys_, {heads, pages(), dim / 2, size, 2}, "keys");
    view_.values = page_data(values_, {heads, pages(), size / 2, dim, 2}, "values");
  } else {
    view_.keys = page_data(keys_, {heads, pages(), dim, size}, "keys");
    view_.values = page_data(values_, {heads, pages(), size, dim}, "values");
  }
  view_.kv_heads = heads, view_.pages = pages(), view_.dim = dim, view_.page = size;
  view_.key_scales = view_.value_scales = nullptr;
  require(key_scales_.has_value() == scaled && value_scales_.has_value() == scaled,
          "key_scales and value_scales belong to int8 keys and values, and to no others");
  if (!scaled) return;
  view_.key_scales = contiguous<float>(*key_scales_, {heads, pages(), size}, "key_scales", "float32");
  view_.value_scales = contiguous<float>(*value_scales_, {heads, pages(), size}, "value_scales", "float32");
}

void require_shape(const Rows& array, int64_t rows, int64_t cols, const char* name) {
  if (array.dtype == DType::f32 && array.rows == rows && array.cols == cols) return;
  refuse("%s must be float32 [%lld, %lld], got shape [%lld, %lld]%s", name, number(rows), number(cols),
         number(array.rows), number(array.cols), array.dtype == DType::f32 ? "" : " of bfloat16");
}

DeltaNet delta_net(const Rows& qkvz, const Rows& ba, const DeltaNetWeights& weights,
                   const RecurrentStates& states, const Batch& batch, const Rows& out) {
  require_shape(qkvz, batch.tokens(), weights.conv_channels() + weights.values(), "qkvz");
  require_shape(ba, batch.tokens(), 2 * weights.value_heads(), "ba");
  require_shape(out, batch.tokens(), weights.values(), "out");
  batch.require_slots(states.slots());
  DeltaNet layer = weights.view();
  layer.qkvz = qkvz, layer.ba = ba, layer.out = out;
  states.place(weights, layer);
  layer.sequences = batch.view();
  return layer;
}

KeysAndValues keys_and_values(const Rows& k, const Rows& v, const NormWeight& k_norm,
                              const KeyValuePages& pages, const Batch& batch) {
  KeysAndValues op = {};
  op.cache = pages.view();
  const int64_t dim = op.cache.dim, keys = op.cache.kv_heads * dim;
  require_shape(k, batch.tokens(), keys, "k");
  require_shape(v, batch.tokens(), keys, "v");
  require(k_norm.dim() == dim, "the norms must have the cache's head dim");
  require(batch.rotated() <= dim, "cos and sin turn more than the head dim");
  batch.require_pages(op.cache.page, pages.pages());
  op.k = k, op.v = v;
  op.sequences = batch.view();
  op.k_norm = k_norm.scale(), op.eps = k_norm.eps();
  op.cos = batch.cos(), op.sin = batch.sin(), op.rotated = batch.rotated();
  return op;
}

Attention attention(const Rows& q, const Rows& k, const Rows& v, const NormWeight& q_norm,
                    const NormWeight& k_norm, bool gated, const KeyValuePages& pages, const Batch& batch,
                    const Rows& out) {
  Attention op = {};
  static_cast<KeysAndValues&>(op) = keys_and_values(k, v, k_norm, pages, batch);
  op.gated = gated;
  const int64_t tokens = batch.tokens(), dim = op.cache.dim;
  const int64_t head = gated ? 2 * dim : dim;
  require(
      q.cols > 0 && q.cols % (head * op.cache.kv_heads) == 0,
      "q must have, for each key head, the same number of heads of the cache's head dim (twice, if gated)");
  op.heads = q.cols / head;
  require_shape(q, tokens, q.cols, "q");
  require_shape(out, tokens, op.heads * dim, "out");
  require(q_norm.dim() == dim, "the norms must have the cache's head dim");
  require(q_norm.eps() == op.eps, "the norms must have the same eps");
  op.q = q, op.out = out, op.q_norm = q_norm.scale();
  return op;
}

}  // namespace tenfold
