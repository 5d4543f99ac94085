// Half a layer in one call: a norm, the products before and after, and what lies between. In decoding each array that
// crosses from Python costs microseconds, and more once weights have swept the caches: so none does but the first.
//
// A block keeps references to the weights that it is made of; whoever binds it keeps them alive.
#pragma once

#include "layers.h"
#include "packed.h"

namespace tenfold {

// The residual stream x [T, D], fp32: an array's, or its own. What the last block adds to it stands beside it until the
// next one's norm adds it on its way.
class Residual {
 public:
  explicit Residual(Output x);
  Residual(int64_t rows, int64_t cols);  // its own, of any content
  // Rows of weights that stand one below the other: embeddings of tokens.
  Residual(const std::vector<const PackedLinear*>& weights, const std::vector<int64_t>& rows);

  const Rows& x() const { return x_; }
  void normalize(const NormWeight& norm, const Rows& out);  // of x, after adding to it what was to be added
  const Rows& added();                                      // room for what a block adds
  void settle();                                            // adds what was to be added

 private:
  void make_room();

  Output array_;
  Memory own_, memory_;
  Rows x_ = {}, added_ = {};
  bool pending_ = false;
};

// Where multi-token prediction begins: the embeddings of tokens and the hidden states before them, each behind a norm,
// side by side through one weight [D, 2 D].
class DraftInput {
 public:
  DraftInput(const NormWeight& embedding_norm, const NormWeight& hidden_norm, const PackedLinear& weight);

  Residual run(const std::vector<const PackedLinear*>& embedding, const std::vector<int64_t>& tokens,
               const Rows& hidden) const;
  int64_t dim() const { return weight_.rows; }

 private:
  const NormWeight &embedding_norm_, &hidden_norm_;
  PackedMatrix weight_;
};

class AttentionBlock {
 public:
  AttentionBlock(const NormWeight& norm, const PackedLinear& q, const PackedLinear& k, const PackedLinear& v,
                 const NormWeight& q_norm, const NormWeight& k_norm, const PackedLinear& output, bool gated);

  void run(Residual& residual, const KeyValuePages& cache, const Batch& batch) const;
  // Of that, what it leaves in the cache; nothing is added to the residual stream.
  void remember(Residual& residual, const KeyValuePages& cache, const Batch& batch) const;

 private:
  const NormWeight &norm_, &q_norm_, &k_norm_;
  std::array<PackedMatrix, 3> inputs_;
  PackedMatrix output_;
  bool gated_;
};

class DeltaNetBlock {
 public:
  DeltaNetBlock(const NormWeight& norm, const PackedLinear& qkvz, const PackedLinear& ba,
                const DeltaNetWeights& weights, const PackedLinear& output);

  void run(Residual& residual, const RecurrentStates& states, const Batch& batch) const;

 private:
  const NormWeight& norm_;
  const DeltaNetWeights& weights_;
  std::array<PackedMatrix, 2> inputs_;
  PackedMatrix output_;
};

// The experts behind the router's are the parts of the shared one, which every token chooses.
class SparseBlock {
 public:
  SparseBlock(const NormWeight& norm, const PackedLinear& router, const PackedLinear& shared_gate,
              const PackedExperts& experts, int64_t choices, bool normalize);

  void run(Residual& residual) const;

 private:
  const NormWeight& norm_;
  const PackedExperts& experts_;
  std::array<PackedMatrix, 2> router_;
  int64_t choices_;
  bool normalize_;
};

class DenseBlock {
 public:
  DenseBlock(const NormWeight& norm, const PackedLinear& gate, const PackedLinear& up,
             const PackedLinear& down);

  void run(Residual& residual) const;

 private:
  const NormWeight& norm_;
  std::array<PackedMatrix, 2> inputs_;
  PackedMatrix output_;
};

}  // namespace tenfold
