#include "blocks.h"

#include "memory.h"
#include "run.h"

namespace tenfold {
namespace {

// Matrices of fp32 with these numbers of columns, in the calling thread's memory until its next block.
template <size_t N>
std::array<Rows, N> matrices(int64_t rows, const std::array<int64_t, N>& cols) {
  std::array<Rows, N> out;
  std::array<size_t, N> at;
  size_t used = 0;
  for (size_t i = 0; i < N; ++i) {
    at[i] = used;
    used += (static_cast<size_t>(rows * cols[i]) * sizeof(float) + 63) / 64 * 64;
  }
  uint8_t* memory = workspace(used);
  for (size_t i = 0; i < N; ++i) out[i] = {memory + at[i], DType::f32, rows, cols[i], cols[i]};
  return out;
}

void normalize(const Stream& stream, const NormWeight& norm, const Rows& out) {
  run(RmsNorm{stream.x, out, stream.delta, norm.scale(), norm.eps()});
}

template <size_t N>
void multiply(const Rows& x, const std::array<PackedMatrix, N>& weights, const std::array<Rows, N>& outs) {
  run(Product{x, weights.data(), outs.data(), N, nullptr});
}

void require_reads(const NormWeight& norm, std::initializer_list<PackedMatrix> weights) {
  for (const PackedMatrix& weight : weights) {
    require(weight.cols == norm.dim(), "a block's weights must have as many columns as its norm");
    require((weight.format == Format::bf16) == (weights.begin()->format == Format::bf16),
            "weights that read the same input are all bf16, or none is");
  }
}

void require_writes(const NormWeight& norm, const PackedMatrix& weight, int64_t cols) {
  require(weight.rows == norm.dim() && weight.cols == cols,
          "a block's last weight must lead from what the block computes back to the residual stream");
}

}  // namespace

AttentionBlock::AttentionBlock(const NormWeight& norm, const PackedLinear& q, const PackedLinear& k,
                               const PackedLinear& v, const NormWeight& q_norm, const NormWeight& k_norm,
                               const PackedLinear& output, bool gated)
    : norm_(norm),
      q_norm_(q_norm),
      k_norm_(k_norm),
      inputs_{q.view(), k.view(), v.view()},
      output_(output.view()),
      gated_(gated) {
  require_reads(norm, {inputs_[0], inputs_[1], inputs_[2]});
  require(!gated || q.rows() % 2 == 0, "gated queries need an even number of rows");
  require_writes(norm, output_, gated ? q.rows() / 2 : q.rows());
}

void AttentionBlock::run(const Stream& stream, const KeyValuePages& cache, const Batch& batch,
                         const Rows& out) const {
  const auto [x, q, k, v, y] =
      matrices<5>(stream.x.rows, {hidden(), inputs_[0].rows, inputs_[1].rows, inputs_[2].rows, output_.cols});
  normalize(stream, norm_, x);
  multiply<3>(x, inputs_, {q, k, v});
  tenfold::run(attention(q, k, v, q_norm_, k_norm_, gated_, cache, batch, y));
  multiply<1>(y, {output_}, {out});
}

DeltaNetBlock::DeltaNetBlock(const NormWeight& norm, const PackedLinear& qkvz, const PackedLinear& ba,
                             const DeltaNetWeights& weights, const PackedLinear& output)
    : norm_(norm), weights_(weights), inputs_{qkvz.view(), ba.view()}, output_(output.view()) {
  require_reads(norm, {inputs_[0], inputs_[1]});
  require_writes(norm, output_, weights.values());
}

void DeltaNetBlock::run(const Stream& stream, const RecurrentStates& states, const Batch& batch,
                        const Rows& out) const {
  const auto [x, qkvz, ba, y] =
      matrices<4>(stream.x.rows, {hidden(), inputs_[0].rows, inputs_[1].rows, output_.cols});
  normalize(stream, norm_, x);
  multiply<2>(x, inputs_, {qkvz, ba});
  tenfold::run(delta_net(qkvz, ba, weights_, states, batch, y));
  multiply<1>(y, {output_}, {out});
}

SparseBlock::SparseBlock(const NormWeight& norm, const PackedLinear& router, const PackedLinear& shared_gate,
                         const PackedExperts& experts, int64_t choices, bool normalize)
    : norm_(norm),
      experts_(experts),
      router_{router.view(), shared_gate.view()},
      choices_(choices),
      normalize_(normalize) {
  require_reads(norm, {router_[0], router_[1]});
  require(experts.hidden() == norm.dim(), "the experts must have the norm's dimension");
  require(shared_gate.rows() == 1, "the shared expert's gate must have one row");
  require(experts.count() > router.rows(), "behind the router's experts must come the shared one");
  require(choices >= 1 && choices <= router.rows(), "as many experts cannot be chosen");
}

void SparseBlock::run(const Stream& stream, const Rows& out) const {
  const int64_t tokens = stream.x.rows, shared = experts_.count() - router_[0].rows;
  const int64_t places = choices_ + shared;
  require(tokens * places < INT32_MAX, "too many tokens for one call");
  const auto [x, logits, gate, numbers, weights] =
      matrices<5>(tokens, {hidden(), router_[0].rows, 1, places, places});
  auto* chosen = static_cast<int32_t*>(numbers.data);
  auto* factors = static_cast<float*>(weights.data);
  normalize(stream, norm_, x);
  multiply<2>(x, router_, {logits, gate});
  tenfold::run(Router{logits, &gate, choices_, shared, normalize_, chosen, factors});
  tenfold::run(ExpertLayer{x, out, experts_.experts(), experts_.format(), experts_.count(), experts_.width(),
                           chosen, factors, places, 0, nullptr});
}

DenseBlock::DenseBlock(const NormWeight& norm, const PackedLinear& gate, const PackedLinear& up,
                       const PackedLinear& down)
    : norm_(norm), inputs_{gate.view(), up.view()}, output_(down.view()) {
  require_reads(norm, {inputs_[0], inputs_[1]});
  require(gate.rows() == up.rows(), "gate and up must have the same shape");
  require_writes(norm, output_, gate.rows());
}

void DenseBlock::run(const Stream& stream, const Rows& out) const {
  const auto [x, gate, up, h] =
      matrices<4>(stream.x.rows, {hidden(), inputs_[0].rows, inputs_[1].rows, output_.cols});
  normalize(stream, norm_, x);
  multiply<2>(x, inputs_, {gate, up});
  tenfold::run(SwiGlu{gate, up, h});
  multiply<1>(h, {output_}, {out});
}

}  // namespace tenfold
