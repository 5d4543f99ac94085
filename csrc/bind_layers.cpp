// The kernels of a layer other than its products, for Python.

#include "bind_layers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "layers.h"
#include "memory.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace tenfold {
namespace {

// A matrix of fp32 with this shape.
template <class Array>
Rows activations(const Array& array, int64_t rows, int64_t cols, const char* name) {
  const Rows view = matrix(array, name);
  if (view.dtype != DType::f32 || view.rows != rows || view.cols != cols) {
    refuse("%s must be float32 [%lld, %lld], got shape %s%s", name, static_cast<long long>(rows),
           static_cast<long long>(cols), shape_of(array).c_str(),
           view.dtype == DType::f32 ? "" : " of bfloat16");
  }
  return view;
}

template <class Array>
int64_t rows_of(const Array& array, const char* name) {
  return matrix(array, name).rows;
}

void gated_delta_net(const Input& qkvz, const Input& ba, const DeltaNetWeights& weights,
                     const RecurrentStates& states, const Batch& batch, const Output& out) {
  DeltaNet layer = weights.view();
  layer.qkvz = activations(qkvz, batch.tokens(), weights.conv_channels() + weights.values(), "qkvz");
  layer.ba = activations(ba, batch.tokens(), 2 * weights.value_heads(), "ba");
  layer.out = activations(out, batch.tokens(), weights.values(), "out");
  batch.require_slots(states.slots());
  states.place(weights, layer);
  layer.sequences = batch.view();
  layer.threads = threads();
  layer.scratch = scratch(kernels().delta_net_scratch(layer));
  const nb::gil_scoped_release release;
  kernels().delta_net(layer);
}

void attention(const Input& q, const Input& k, const Input& v, const NormWeight& q_norm,
               const NormWeight& k_norm, bool gated, const KeyValuePages& cache, const Batch& batch,
               const Output& out) {
  Attention op = {};
  op.cache = cache.view();
  op.gated = gated;
  const int64_t tokens = batch.tokens(), dim = op.cache.dim, keys = op.cache.kv_heads * dim;
  const int64_t width = matrix(q, "q").cols, head = gated ? 2 * dim : dim;
  require(
      width > 0 && width % (head * op.cache.kv_heads) == 0,
      "q must have, for each key head, the same number of heads of the cache's head dim (twice, if gated)");
  op.heads = width / head;
  op.q = activations(q, tokens, width, "q");
  op.k = activations(k, tokens, keys, "k");
  op.v = activations(v, tokens, keys, "v");
  op.out = activations(out, tokens, op.heads * dim, "out");
  require(q_norm.dim() == dim && k_norm.dim() == dim, "the norms must have the cache's head dim");
  require(q_norm.eps() == k_norm.eps(), "the norms must have the same eps");
  require(batch.rotated() <= dim, "cos and sin turn more than the head dim");
  batch.require_pages(op.cache.page, cache.pages());
  op.sequences = batch.view();
  op.q_norm = q_norm.scale(), op.k_norm = k_norm.scale(), op.eps = q_norm.eps();
  op.cos = batch.cos(), op.sin = batch.sin(), op.rotated = batch.rotated();
  op.threads = threads();
  op.scratch = scratch(kernels().attention_scratch(op));
  const nb::gil_scoped_release release;
  kernels().attention(op);
}

void rms_norm(const Output& x, const NormWeight& weight, const std::optional<Input>& delta,
              const Output& out) {
  const int64_t rows = rows_of(x, "x");
  const Rows input = activations(x, rows, weight.dim(), "x");
  const Rows added = delta ? activations(*delta, rows, weight.dim(), "delta") : Rows{};
  const Rows output = activations(out, rows, weight.dim(), "out");
  const nb::gil_scoped_release release;
  kernels().rms_norm({input, output, delta ? &added : nullptr, weight.scale(), weight.eps()});
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
  const int64_t places = choices + (shared_gate ? 1 : 0);
  const Router router = {input,
                         shared_gate ? &gate : nullptr,
                         choices,
                         normalize,
                         contiguous<int32_t>(chosen, {input.rows, places}, "chosen", "int32"),
                         contiguous<float>(weights, {input.rows, places}, "weights", "float32")};
  const nb::gil_scoped_release release;
  kernels().route(router);
}

void swiglu(const Input& gate, const Input& up, const Output& out) {
  const Rows output = matrix(out, "out");
  require(output.cols % 16 == 0, "swiglu: the width must be a multiple of 16");
  const SwiGlu op = {activations(gate, output.rows, output.cols, "gate"),
                     activations(up, output.rows, output.cols, "up"),
                     activations(out, output.rows, output.cols, "out")};
  const nb::gil_scoped_release release;
  kernels().swiglu(op);
}

}  // namespace

void bind_layers(nb::module_& m) {
  using Indices = std::optional<std::vector<int64_t>>;
  using Pages = std::optional<std::vector<std::vector<int32_t>>>;
  nb::class_<Batch>(m, "Batch")
      .def(nb::init<std::vector<int64_t>, Indices, Indices, Pages, std::optional<Input>,
                    std::optional<Input>>(),
           nb::arg("bounds"), nb::arg("slots") = nb::none(), nb::arg("past") = nb::none(),
           nb::arg("pages") = nb::none(), nb::arg("cos") = nb::none(), nb::arg("sin") = nb::none())
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
  m.def("gated_delta_net", &gated_delta_net, nb::arg("qkvz"), nb::arg("ba"), nb::arg("weights"),
        nb::arg("states"), nb::arg("batch"), nb::arg("out"));
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("q_norm"),
        nb::arg("k_norm"), nb::arg("gated"), nb::arg("cache"), nb::arg("batch"), nb::arg("out"));
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("delta").none(), nb::arg("out"));
  m.def("route", &route, nb::arg("logits"), nb::arg("choices"), nb::arg("normalize"),
        nb::arg("shared_gate").none(), nb::arg("chosen"), nb::arg("weights"));
  m.def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), nb::arg("out"));
}

}  // namespace tenfold
