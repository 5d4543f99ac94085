#include "blocks.h"

#include "fence.h"
#include "memory.h"
#include "run.h"

namespace tenfold {
namespace {

// Matrices of fp32 with these numbers of columns, in the calling thread's memory until its next block.
template <size_t N>
std::array<Rows, N> matrices(int64_t rows, const std::array<int64_t, N>& cols) {
  std::array<Rows, N> out;
  const auto bytes = [&](size_t i) { return static_cast<size_t>(rows * cols[i]) * sizeof(float); };
  size_t used = 0;
  for (size_t i = 0; i < N; ++i) used += fenced(bytes(i));
  uint8_t* at = workspace(used);
  for (size_t i = 0; i < N; at += fenced(bytes(i)), ++i) {
    out[i] = {at, DType::f32, rows, cols[i], cols[i]};
    ASAN_POISON_MEMORY_REGION(at + bytes(i), fenced(bytes(i)) - bytes(i));
  }
  return out;
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

int64_t columns(const std::vector<const PackedLinear*>& weights) {
  require(!weights.empty(), "one weight at least");
  return weights[0]->cols();
}

}  // namespace

Residual::Residual(Output x) : array_(std::move(x)), x_(matrix(array_, "x")) {
  require_shape(x_, x_.rows, x_.cols, "x");
  make_room();
}

Residual::Residual(int64_t rows, int64_t cols)
    : own_(allocate(static_cast<size_t>(rows * cols) * sizeof(float))),
      x_{own_.get(), DType::f32, rows, cols, cols} {
  make_room();
}

Residual::Residual(const std::vector<const PackedLinear*>& weights, const std::vector<int64_t>& rows)
    : Residual(static_cast<int64_t>(rows.size()), columns(weights)) {
  take_rows(weights, rows.data(), x_);
}

void Residual::make_room() {
  memory_ = allocate(static_cast<size_t>(x_.rows * x_.cols) * sizeof(float));
  added_ = {memory_.get(), DType::f32, x_.rows, x_.cols, x_.cols};
}

void Residual::normalize(const NormWeight& norm, const Rows& out) {
  require_shape(x_, x_.rows, norm.dim(), "x");
  run(RmsNorm{x_, out, pending_ ? &added_ : nullptr, norm.scale(), norm.eps()});
  pending_ = false;
}

const Rows& Residual::added() {
  pending_ = true;
  return added_;
}

void Residual::settle() {
  if (!pending_) return;
  for (int64_t t = 0; t < x_.rows; ++t) {
    float* x = static_cast<float*>(x_.data) + t * x_.stride;
    const float* added = static_cast<const float*>(added_.data) + t * added_.stride;
    for (int64_t i = 0; i < x_.cols; ++i) x[i] += added[i];
  }
  pending_ = false;
}

DraftInput::DraftInput(const NormWeight& embedding_norm, const NormWeight& hidden_norm,
                       const PackedLinear& weight)
    : embedding_norm_(embedding_norm), hidden_norm_(hidden_norm), weight_(weight.view()) {
  const int64_t dim = embedding_norm.dim();
  require(hidden_norm.dim() == dim && weight_.rows == dim && weight_.cols == 2 * dim,
          "the weight must lead from both norms' dimensions to one");
}

Residual DraftInput::run(const std::vector<const PackedLinear*>& embedding,
                         const std::vector<int64_t>& tokens, const Rows& hidden) const {
  const int64_t rows = static_cast<int64_t>(tokens.size()), dim = weight_.rows;
  const auto [embedded, both] = matrices<2>(rows, {dim, 2 * dim});
  take_rows(embedding, tokens.data(), embedded);
  const Rows left = {both.data, DType::f32, rows, dim, both.stride};
  const Rows right = {static_cast<float*>(both.data) + dim, DType::f32, rows, dim, both.stride};
  tenfold::run(RmsNorm{embedded, left, nullptr, embedding_norm_.scale(), embedding_norm_.eps()});
  tenfold::run(RmsNorm{hidden, right, nullptr, hidden_norm_.scale(), hidden_norm_.eps()});
  Residual residual(rows, dim);
  multiply<1>(both, {weight_}, {residual.x()});
  return residual;
}

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

void AttentionBlock::run(Residual& residual, const KeyValuePages& cache, const Batch& batch) const {
  const auto [x, q, k, v, y] = matrices<5>(
      residual.x().rows, {norm_.dim(), inputs_[0].rows, inputs_[1].rows, inputs_[2].rows, output_.cols});
  residual.normalize(norm_, x);
  multiply<3>(x, inputs_, {q, k, v});
  tenfold::run(attention(q, k, v, q_norm_, k_norm_, gated_, cache, batch, y));
  multiply<1>(y, {output_}, {residual.added()});
}

void AttentionBlock::remember(Residual& residual, const KeyValuePages& cache, const Batch& batch) const {
  const auto [x, k, v] = matrices<3>(residual.x().rows, {norm_.dim(), inputs_[1].rows, inputs_[2].rows});
  residual.normalize(norm_, x);
  multiply<2>(x, {inputs_[1], inputs_[2]}, {k, v});
  tenfold::run(keys_and_values(k, v, k_norm_, cache, batch));
}

DeltaNetBlock::DeltaNetBlock(const NormWeight& norm, const PackedLinear& qkvz, const PackedLinear& ba,
                             const DeltaNetWeights& weights, const PackedLinear& output)
    : norm_(norm), weights_(weights), inputs_{qkvz.view(), ba.view()}, output_(output.view()) {
  require_reads(norm, {inputs_[0], inputs_[1]});
  require_writes(norm, output_, weights.values());
}

void DeltaNetBlock::run(Residual& residual, const RecurrentStates& states, const Batch& batch) const {
  const auto [x, qkvz, ba, y] =
      matrices<4>(residual.x().rows, {norm_.dim(), inputs_[0].rows, inputs_[1].rows, output_.cols});
  residual.normalize(norm_, x);
  multiply<2>(x, inputs_, {qkvz, ba});
  tenfold::run(delta_net(qkvz, ba, weights_, states, batch, y));
  multiply<1>(y, {output_}, {residual.added()});
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

void SparseBlock::run(Residual& residual) const {
  const int64_t tokens = residual.x().rows, shared = experts_.count() - router_[0].rows;
  const int64_t places = choices_ + shared;
  require(tokens * places < INT32_MAX, "too many tokens for one call");
  const auto [x, logits, gate, numbers, weights] =
      matrices<5>(tokens, {norm_.dim(), router_[0].rows, 1, places, places});
  auto* chosen = static_cast<int32_t*>(numbers.data);
  auto* factors = static_cast<float*>(weights.data);
  residual.normalize(norm_, x);
  multiply<2>(x, router_, {logits, gate});
  tenfold::run(Router{logits, &gate, choices_, shared, normalize_, chosen, factors});
  tenfold::run(ExpertLayer{x, residual.added(), experts_.experts(), experts_.format(), experts_.count(),
                           experts_.width(), chosen, factors, places, 0, nullptr});
}

DenseBlock::DenseBlock(const NormWeight& norm, const PackedLinear& gate, const PackedLinear& up,
                       const PackedLinear& down)
    : norm_(norm), inputs_{gate.view(), up.view()}, output_(down.view()) {
  require_reads(norm, {inputs_[0], inputs_[1]});
  require(gate.rows() == up.rows(), "gate and up must have the same shape");
  require_writes(norm, output_, gate.rows());
}

void DenseBlock::run(Residual& residual) const {
  const auto [x, gate, up, h] =
      matrices<4>(residual.x().rows, {norm_.dim(), inputs_[0].rows, inputs_[1].rows, output_.cols});
  residual.normalize(norm_, x);
  multiply<2>(x, inputs_, {gate, up});
  tenfold::run(SwiGlu{gate, up, h});
  multiply<1>(h, {output_}, {residual.added()});
}

}  // namespace tenfold
