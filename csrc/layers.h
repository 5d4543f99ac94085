// What the kernels of a layer need besides activations, checked once and kept: a call then passes few arrays,
// each of which costs microseconds.
#pragma once

#include <optional>
#include <vector>

#include "arrays.h"

namespace tenfold {

// cos and sin [positions, rotated / 2], by the position of a token in its sequence.
class Rotation {
 public:
  Rotation(Input cos, Input sin);

  int64_t positions() const { return static_cast<int64_t>(cos_array_.shape(0)); }
  int64_t half() const { return static_cast<int64_t>(cos_array_.shape(1)); }
  const float* cos() const { return cos_; }
  const float* sin() const { return sin_; }

 private:
  Input cos_array_, sin_array_;
  const float *cos_, *sin_;
};

// The sequences of a step, for all its layers.
class Batch {
 public:
  // `slots`: each sequence's recurrent state. `past` and `pages`: how many tokens it has in the cache, and
  // the pages for those and the new ones. `saves`: the slots where the states after each one's last tokens go
  // besides.
  Batch(std::vector<int64_t> bounds, std::optional<std::vector<int64_t>> slots,
        std::optional<std::vector<int64_t>> past, std::optional<std::vector<Input>> pages,
        const Rotation* rotation, std::optional<std::vector<std::vector<int64_t>>> saves);

  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t tokens() const { return bounds_.back(); }
  int64_t rotated() const { return rotated_; }
  const float* cos() const { return cos_.data(); }  // of each token
  const float* sin() const { return sin_.data(); }
  Sequences view() const;

  // Slots below `slots` for every sequence; none is used twice.
  void require_slots(int64_t slots) const;
  // Pages of `size` tokens for every sequence, numbered below `pages`; none that is written is shared.
  void require_pages(int64_t size, int64_t pages) const;

 private:
  void take_pages(const std::vector<Input>& pages);
  void take_saves(std::vector<std::vector<int64_t>> saves);
  void take_rotation(const Rotation& rotation);
  void check_slots(int64_t slots) const;
  void check_pages(int64_t size, int64_t pages) const;
  int64_t pages_needed(size_t sequence, int64_t size) const;

  std::vector<int64_t> bounds_, slots_, past_, saved_;
  std::vector<std::vector<int32_t>> pages_;
  std::vector<const int32_t*> page_tables_;
  std::vector<std::vector<int64_t>> saves_;
  std::vector<const int64_t*> save_tables_;
  std::vector<float> cos_, sin_;
  int64_t rotated_ = 0;
  mutable int64_t checked_size_ = 0, checked_pages_ = 0, checked_slots_ = 0;
};

class NormWeight {
 public:
  NormWeight(const Input& weight, float eps, bool zero_centered);

  int64_t dim() const { return static_cast<int64_t>(scale_.size()); }
  const float* scale() const { return scale_.data(); }
  float eps() const { return eps_; }

 private:
  std::vector<float> scale_;
  float eps_;
};

class DeltaNetWeights {
 public:
  DeltaNetWeights(const Input& conv_weight, const Input& A_log, const Input& dt_bias,
                  const Input& norm_weight, int64_t key_heads, float eps);

  DeltaNet view() const;  // without activations and states
  int64_t value_heads() const { return shape_.key_heads * shape_.shared; }
  int64_t values() const { return value_heads() * shape_.value_dim; }
  int64_t conv_channels() const { return 2 * shape_.key_heads * shape_.key_dim + values(); }

 private:
  void by_key_head(const std::vector<float>& conv_weight);

  DeltaNet shape_ = {};
  std::vector<float> conv_weight_, rate_, dt_bias_, norm_weight_;
};

// Conv states [slots, C, W - 1] and recurrent states [slots, HV, V, K].
class RecurrentStates {
 public:
  RecurrentStates(Output conv, Output recurrent);

  int64_t slots() const { return static_cast<int64_t>(conv_.shape(0)); }
  void place(const DeltaNetWeights& weights, DeltaNet& layer) const;

 private:
  Output conv_, recurrent_;
};

// A Gated DeltaNet with its activations and states; refuses those that do not fit.
DeltaNet delta_net(const Rows& qkvz, const Rows& ba, const DeltaNetWeights& weights,
                   const RecurrentStates& states, const Batch& batch, const Rows& out);

class KeyValuePages {
 public:
  KeyValuePages(Output keys, Output values, std::optional<Output> key_scales = std::nullopt,
                std::optional<Output> value_scales = std::nullopt);

  const PagedCache& view() const { return view_; }
  int64_t pages() const { return static_cast<int64_t>(keys_.shape(1)); }

 private:
  Output keys_, values_;
  std::optional<Output> key_scales_, value_scales_;
  PagedCache view_;
};

// Keys and values with their pages; refuses those that do not fit.
KeysAndValues keys_and_values(const Rows& k, const Rows& v, const NormWeight& k_norm,
                              const KeyValuePages& pages, const Batch& batch);

// An attention with its activations and pages; refuses those that do not fit.
Attention attention(const Rows& q, const Rows& k, const Rows& v, const NormWeight& q_norm,
                    const NormWeight& k_norm, bool gated, const KeyValuePages& pages, const Batch& batch,
                    const Rows& out);

// Refuses what is no fp32 [rows, cols].
void require_shape(const Rows& array, int64_t rows, int64_t cols, const char* name);

}  // namespace tenfold
