// Half a layer in one call: a norm, the products before and after, and what lies between. In decoding each array that
// crosses from Python costs microseconds, so few should.
//
// A block keeps references to the weights that it is made of; whoever binds it keeps them alive.
#pragma once

#include "layers.h"
#include "packed.h"

namespace tenfold {

// The residual stream x [T, D], fp32, to which delta, where there is one, is added before a block reads it.
struct Stream {
  Rows x;
  const Rows* delta;
};

class AttentionBlock {
 public:
  AttentionBlock(const NormWeight& norm, const PackedLinear& q, const PackedLinear& k, const PackedLinear& v,
                 const NormWeight& q_norm, const NormWeight& k_norm, const PackedLinear& output, bool gated);

  int64_t hidden() const { return norm_.dim(); }
  void run(const Stream& stream, const KeyValuePages& cache, const Batch& batch, const Rows& out) const;

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

  int64_t hidden() const { return norm_.dim(); }
  void run(const Stream& stream, const RecurrentStates& states, const Batch& batch, const Rows& out) const;

 private:
  const NormWeight& norm_;
  const DeltaNetWeights& weights_;
  std::array<PackedMatrix, 2> inputs_;
  PackedMatrix output_;
};

// The experts behind the first `routed` are the parts of the shared one, which every token chooses.
class SparseBlock {
 public:
  SparseBlock(const NormWeight& norm, const PackedLinear& router, const PackedLinear& shared_gate,
              const PackedExperts& experts, int64_t choices, bool normalize);

  int64_t hidden() const { return norm_.dim(); }
  void run(const Stream& stream, const Rows& out) const;

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

  int64_t hidden() const { return norm_.dim(); }
  void run(const Stream& stream, const Rows& out) const;

 private:
  const NormWeight& norm_;
  std::array<PackedMatrix, 2> inputs_;
  PackedMatrix output_;
};

}  // namespace tenfold
