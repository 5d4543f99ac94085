// The kernels of a layer other than its products, for Python.

#include "bind_layers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "blocks.h"
#include "run.h"

namespace nb = nanobind;

namespace tenfold {
namespace {

// A matrix of fp32 with this shape.
template <class Array>
Rows activations(const Array& array, int64_t rows, int64_t cols, const char* name) {
  const Rows view = matrix(array, name);
  require_shape(view, rows, cols, name);
  return view;
}

void run_delta_net(const Input& qkvz, const Input& ba, const DeltaNetWeights& weights,
                   const RecurrentStates& states, const Batch& batch, const Output& out) {
  const DeltaNet op =
      delta_net(matrix(qkvz, "qkvz"), matrix(ba, "ba"), weights, states, batch, matrix(out, "out"));
  const nb::gil_scoped_release release;
  run(op);
}

void run_attention(const Input& q, const Input& k, const Input& v, const NormWeight& q_norm,
                   const NormWeight& k_norm, bool gated, const KeyValuePages& cache, const Batch& batch,
                   const Output& out) {
  const Attention op = attention(matrix(q, "q"), matrix(k, "k"), matrix(v, "v"), q_norm, k_norm, gated, cache,
                                 batch, matrix(out, "out"));
  const nb::gil_scoped_release release;
  run(op);
}

void rms_norm(const Output& x, const NormWeight& weight, const std::optional<Input>& delta,
              const Output& out) {
  const int64_t rows = matrix(x, "x").rows;
  const Rows input = activations(x, rows, weight.dim(), "x");
  const Rows added = delta ? activations(*delta, rows, weight.dim(), "delta") : Rows{};
  const Rows output = activations(out, rows, weight.dim(), "out");
  const nb::gil_scoped_release release;
  run(RmsNorm{input, output, delta ? &added : nullptr, weight.scale(), weight.eps()});
}

void route(const Input& logits, int64_t choices, bool normalize, const std::optional<Input>& shared_gate,
           const Output& chosen, const Output& weights) {
  const Rows input = matrix(logits, "logits");
  require(input.dtype == DType::f32 && input.cols < INT32_MAX, "logits must be float32 [tokens, experts]");
  if (choices < 1 || choices > input.cols) {
    refuse("route: of %lld experts %lld cannot be chosen", static_cast<long long>(input.cols),
           static_cast<long long>(choices));
  }
  const Rows gate = shared_gate ? activations(*shared_gate, input.rows, 1, "shared_gate") : Rows{};
  require(chosen.ndim() == 2, "chosen must be [tokens, places]");
  const int64_t places = static_cast<int64_t>(chosen.shape(1)), shared = places - choices;
  require(shared_gate ? shared >= 1 : shared == 0,
          "route: a place for each choice, and for each shared expert");
  const Router router = {input,
                         shared_gate ? &gate : nullptr,
                         choices,
                         shared,
                         normalize,
                         contiguous<int32_t>(chosen, {input.rows, places}, "chosen", "int32"),
                         contiguous<float>(weights, {input.rows, places}, "weights", "float32")};
  const nb::gil_scoped_release release;
  run(router);
}

void swiglu(const Input& gate, const Input& up, const Output& out) {
  const Rows output = matrix(out, "out");
  require(output.cols % 16 == 0, "swiglu: the width must be a multiple of 16");
  const SwiGlu op = {activations(gate, output.rows, output.cols, "gate"),
                     activations(up, output.rows, output.cols, "up"),
                     activations(out, output.rows, output.cols, "out")};
  const nb::gil_scoped_release release;
  run(op);
}

// block.run(residual, memory...), without the interpreter's lock.
template <class Block, class... Memory>
void run_block(const Block& block, Residual& residual, const Memory&... memory) {
  const nb::gil_scoped_release release;
  block.run(residual, memory...);
}

void remember(const AttentionBlock& block, Residual& residual, const KeyValuePages& cache,
              const Batch& batch) {
  const nb::gil_scoped_release release;
  block.remember(residual, cache, batch);
}

Residual run_draft_input(const DraftInput& block, const std::vector<const PackedLinear*>& embedding,
                         const std::vector<int64_t>& tokens, const Input& hidden) {
  const Rows rows = matrix(hidden, "hidden");
  require_shape(rows, static_cast<int64_t>(tokens.size()), block.dim(), "hidden");
  require(rows.dtype == DType::f32, "hidden must be float32");
  const nb::gil_scoped_release release;
  return block.run(embedding, tokens, rows);
}

void normalize(Residual& residual, const NormWeight& norm, const Output& out) {
  const Rows rows = activations(out, residual.x().rows, norm.dim(), "out");
  const nb::gil_scoped_release release;
  residual.normalize(norm, rows);
}

void bind_blocks(nb::module_& m) {
  using Norm = const NormWeight&;
  using Linear = const PackedLinear&;
  nb::class_<Residual>(m, "Residual")
      .def(nb::init<Output>(), nb::arg("x"))
      .def(nb::init<const std::vector<const PackedLinear*>&, const std::vector<int64_t>&>(),
           nb::arg("weights"), nb::arg("rows"))
      .def_prop_ro("shape", [](const Residual& self) { return nb::make_tuple(self.x().rows, self.x().cols); })
      .def("settle", &Residual::settle)
      .def("normalize", &normalize, nb::arg("norm"), nb::arg("out"));
  nb::class_<DraftInput>(m, "DraftInput")
      .def(nb::init<Norm, Norm, Linear>(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::arg("embedding_norm"), nb::arg("hidden_norm"), nb::arg("weight"))
      .def("__call__", &run_draft_input, nb::arg("embedding"), nb::arg("tokens"), nb::arg("hidden"));
  nb::class_<AttentionBlock>(m, "AttentionBlock")
      .def(nb::init<Norm, Linear, Linear, Linear, Norm, Norm, Linear, bool>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::arg("norm"), nb::arg("q"), nb::arg("k"),
           nb::arg("v"), nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("output"), nb::arg("gated"))
      .def("__call__", &run_block<AttentionBlock, KeyValuePages, Batch>, nb::arg("residual"),
           nb::arg("cache"), nb::arg("batch"))
      .def("remember", &remember, nb::arg("residual"), nb::arg("cache"), nb::arg("batch"));
  nb::class_<DeltaNetBlock>(m, "DeltaNetBlock")
      .def(nb::init<Norm, Linear, Linear, const DeltaNetWeights&, Linear>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::arg("norm"), nb::arg("qkvz"), nb::arg("ba"), nb::arg("weights"), nb::arg("output"))
      .def("__call__", &run_block<DeltaNetBlock, RecurrentStates, Batch>, nb::arg("residual"),
           nb::arg("states"), nb::arg("batch"));
  nb::class_<SparseBlock>(m, "SparseBlock")
      .def(nb::init<Norm, Linear, Linear, const PackedExperts&, int64_t, bool>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::arg("norm"),
           nb::arg("router"), nb::arg("shared_gate"), nb::arg("experts"), nb::arg("choices"),
           nb::arg("normalize"))
      .def("__call__", &run_block<SparseBlock>, nb::arg("residual"));
  nb::class_<DenseBlock>(m, "DenseBlock")
      .def(nb::init<Norm, Linear, Linear, Linear>(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::arg("norm"), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"))
      .def("__call__", &run_block<DenseBlock>, nb::arg("residual"));
}

}  // namespace

void bind_layers(nb::module_& m) {
  using Indices = std::optional<std::vector<int64_t>>;
  using Pages = std::optional<std::vector<Input>>;
  using Saves = std::optional<std::vector<std::vector<int64_t>>>;
  nb::class_<Rotation>(m, "Rotation").def(nb::init<Input, Input>(), nb::arg("cos"), nb::arg("sin"));
  nb::class_<Batch>(m, "Batch")
      .def(nb::init<std::vector<int64_t>, Indices, Indices, Pages, const Rotation*, Saves>(),
           nb::arg("bounds"), nb::arg("slots") = nb::none(), nb::arg("past") = nb::none(),
           nb::arg("pages") = nb::none(), nb::arg("rotation") = nb::none(), nb::arg("saves") = nb::none())
      .def_prop_ro("tokens", &Batch::tokens);
  nb::class_<NormWeight>(m, "NormWeight")
      .def(nb::init<Input, float, bool>(), nb::arg("weight"), nb::arg("eps"), nb::arg("zero_centered"))
      .def_prop_ro("dim", &NormWeight::dim);
  nb::class_<DeltaNetWeights>(m, "DeltaNetWeights")
      .def(nb::init<Input, Input, Input, Input, int64_t, float>(), nb::arg("conv_weight"), nb::arg("A_log"),
           nb::arg("dt_bias"), nb::arg("norm_weight"), nb::arg("key_heads"), nb::arg("eps"))
      .def_prop_ro("values", &DeltaNetWeights::values);
  nb::class_<RecurrentStates>(m, "RecurrentStates")
      .def(nb::init<Output, Output>(), nb::arg("conv"), nb::arg("recurrent"));
  nb::class_<KeyValuePages>(m, "KeyValuePages")
      .def(nb::init<Output, Output>(), nb::arg("keys"), nb::arg("values"))
      .def(nb::init<Output, Output, Output, Output>(), nb::arg("keys"), nb::arg("values"),
           nb::arg("key_scales"), nb::arg("value_scales"));
  m.def("gated_delta_net", &run_delta_net, nb::arg("qkvz"), nb::arg("ba"), nb::arg("weights"),
        nb::arg("states"), nb::arg("batch"), nb::arg("out"));
  m.def("attention", &run_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("q_norm"),
        nb::arg("k_norm"), nb::arg("gated"), nb::arg("cache"), nb::arg("batch"), nb::arg("out"));
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("delta").none(), nb::arg("out"));
  m.def("route", &route, nb::arg("logits"), nb::arg("choices"), nb::arg("normalize"),
        nb::arg("shared_gate").none(), nb::arg("chosen"), nb::arg("weights"));
  m.def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), nb::arg("out"));
  bind_blocks(m);
}

}  // namespace tenfold
