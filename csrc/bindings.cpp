// The Python module tenfold.kernels._native: checks arguments, and calls the kernels without the
// interpreter's lock.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <vector>

#include "bind_layers.h"
#include "dispatch.h"
#include "packed.h"
#include "run.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace tenfold {
namespace {

void multiply(const Rows& input, const std::vector<const PackedLinear*>& weights,
              const std::vector<Rows>& outputs) {
  require(!weights.empty() && weights.size() == outputs.size(),
          "linear: one output per weight, and one weight at least");
  std::vector<PackedMatrix> matrices;
  for (size_t i = 0; i < weights.size(); ++i) {
    const PackedMatrix weight = weights[i]->view();
    const Rows& out = outputs[i];
    require(weight.cols == input.cols, "linear: x must have as many columns as each weight");
    require(out.rows == input.rows && out.cols == weight.rows,
            "linear: out must be [tokens, rows of its weight]");
    require((weight.format == Format::bf16) == (weights[0]->format() == Format::bf16),
            "linear: weights of one call are all bf16, or none is");
    matrices.push_back(weight);
  }
  const auto count = static_cast<int64_t>(weights.size());
  const nb::gil_scoped_release release;
  run(Product{input, matrices.data(), outputs.data(), count, nullptr});
}

void linear(const Input& x, const std::vector<const PackedLinear*>& weights,
            const std::vector<Output>& outs) {
  std::vector<Rows> outputs;
  for (const Output& out : outs) outputs.push_back(matrix(out, "out"));
  multiply(matrix(x, "x"), weights, outputs);
}

// Of weights that stand one below the other: their results stand side by side in `out`.
void linear_stacked(const Input& x, const std::vector<const PackedLinear*>& weights, const Output& out) {
  const Rows whole = matrix(out, "out");
  std::vector<Rows> outputs;
  int64_t first = 0;
  for (const PackedLinear* weight : weights) {
    Rows part = whole;
    part.cols = weight->rows();
    part.data = static_cast<uint8_t*>(whole.data) + first * (whole.dtype == DType::f32 ? 4 : 2);
    outputs.push_back(part);
    first += part.cols;
  }
  require(first == whole.cols, "linear_stacked: out must have as many columns as the weights have rows");
  multiply(matrix(x, "x"), weights, outputs);
}

void take_rows_into(const std::vector<const PackedLinear*>& weights, const Input& rows, const Output& out) {
  const auto* numbers = contiguous<int64_t>(rows, {static_cast<int64_t>(rows.size())}, "rows", "int64");
  const Rows to = matrix(out, "out");
  require(to.rows == static_cast<int64_t>(rows.size()), "take_rows: out must have a row for each number");
  take_rows(weights, numbers, to);
}

void check_choice(const int32_t* chosen, int64_t choices, int64_t experts) {
  for (int64_t i = 0; i < choices; ++i) {
    if (chosen[i] < 0 || chosen[i] >= experts) {
      refuse("expert_layer: there are %lld experts, got number %d", static_cast<long long>(experts),
             chosen[i]);
    }
  }
}

void expert_layer(const Input& x, const PackedExperts& experts, const Input& chosen, const Input& weights,
                  const Output& out) {
  const Rows input = matrix(x, "x"), output = matrix(out, "out");
  require(input.cols == experts.hidden(),
          "expert_layer: x must have as many columns as the experts' hidden size");
  require(output.rows == input.rows && output.cols == input.cols,
          "expert_layer: out must have the shape of x");
  require(chosen.ndim() == 2, "expert_layer: chosen must be [tokens, choices]");
  const auto choices = static_cast<int64_t>(chosen.shape(1));
  const auto* numbers = contiguous<int32_t>(chosen, {input.rows, choices}, "chosen", "int32");
  const auto* factors = contiguous<float>(weights, {input.rows, choices}, "weights", "float32");
  require(input.rows * choices < INT32_MAX, "expert_layer: too many tokens for one call");
  check_choice(numbers, input.rows * choices, experts.count());
  const nb::gil_scoped_release release;
  run(ExpertLayer{input, output, experts.experts(), experts.format(), experts.count(), experts.width(),
                  numbers, factors, choices, 0, nullptr});
}

nb::list end_profile() {
  nb::list uses;
  for (const Use& use : stop_profile()) {
    uses.append(nb::make_tuple(use.kernel, use.calls, use.seconds, use.bytes, use.operations));
  }
  return uses;
}

// GB/s at which the pool reads memory far larger than its caches: the best of some sweeps.
double memory_read_gb_s(int64_t megabytes) {
  require(megabytes >= 1 && megabytes <= 1 << 16, "memory_read_gb_s: between 1 and 65536 megabytes");
  const size_t bytes = static_cast<size_t>(megabytes) << 20;
  const Memory memory = allocate(bytes);
  const nb::gil_scoped_release release;
  struct Sweep {
    const uint8_t* from;
    std::atomic<uint64_t> folded{0};
  } sweep{memory.get()};
  for (size_t i = 0; i < bytes; i += 64) memory[i] = static_cast<uint8_t>(i >> 12);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = std::chrono::steady_clock::now();
    run_tasks(
        megabytes, kMostThreads,
        [](const void* context, int64_t task, int) noexcept {
          auto* s = static_cast<Sweep*>(const_cast<void*>(context));
          s->folded ^= kernels().read_memory(s->from + (task << 20), size_t{1} << 20);
        },
        &sweep);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(bytes) / seconds.count() / 1e9);
  }
  return best;
}

// 10^9 multiplications and additions a second that the pool does on numbers in registers: the best of some rounds.
double multiply_gop_s(std::string_view name) {
  const Multiplier multiplier = name == "fp32"                       ? Multiplier::f32
                                : name == "int16"                    ? Multiplier::int16
                                : format_named(name) == Format::bf16 ? Multiplier::bf16
                                : format_named(name) == Format::int8 ? Multiplier::int8
                                                                     : Multiplier::int4;
  struct Round {
    Multiplier multiplier;
    std::atomic<int64_t> products{0};
  } round{multiplier};
  const nb::gil_scoped_release release;
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    round.products = 0;
    const auto start = std::chrono::steady_clock::now();
    run_tasks(
        16 * threads(), kMostThreads,
        [](const void* context, int64_t, int) noexcept {
          auto* r = static_cast<Round*>(const_cast<void*>(context));
          r->products += kernels().multiply_in_registers(r->multiplier);
        },
        &round);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2 * static_cast<double>(round.products) / seconds.count() / 1e9);
  }
  return best;
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> empty_bytes(size_t bytes) {
  uint8_t* memory = allocate(bytes).release();
  const nb::capsule owner(memory, [](void* held) noexcept { Free()(static_cast<uint8_t*>(held)); });
  return {memory, {bytes}, owner};
}

void check_threads(int count) {
  if (count < 1 || count > kMostThreads)
    refuse("threads must be between 1 and %d, got %d", kMostThreads, count);
  set_threads(count);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
  return names;
}

template <class Handle>
void bind_bytes(nb::class_<Handle>& handle) {
  handle.def_prop_ro("format", [](const Handle& self) { return name_of(self.format()); })
      .def_prop_ro("nbytes", [](const Handle& self) { return self.bytes().size(); })
      .def_prop_ro(
          "bytes",
          [](const Handle& self) {
            return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(self.bytes().data(),
                                                                      {self.bytes().size()});
          },
          nb::rv_policy::reference_internal);
}

}  // namespace
}  // namespace tenfold

NB_MODULE(_native, m) {
  using namespace tenfold;
  select_table(available_tables().back()->name);
  m.def("isa", [] { return kernels().name; });
  m.def("isas", &isas);
  m.def("use_isa", [](std::string_view name) { select_table(name); });
  m.def("threads", &threads);
  m.def("set_threads", &check_threads);
  m.def("start_profile", &start_profile);
  m.def("stop_profile", &end_profile);
  m.def("empty_bytes", &empty_bytes, nb::arg("bytes"));
  m.def("memory_read_gb_s", &memory_read_gb_s, nb::arg("megabytes") = 512);

  m.def("multiply_gop_s", &multiply_gop_s, nb::arg("format"));

  nb::class_<PackedLinear> packed_linear(m, "PackedLinear");
  bind_bytes(packed_linear);
  packed_linear
      .def(nb::init<Input, std::string_view, int64_t, int64_t>(), nb::arg("bytes"), nb::arg("format"),
           nb::arg("rows"), nb::arg("cols"))
      .def_static("pack", &PackedLinear::pack, nb::arg("weight"), nb::arg("format"),
                  nb::arg("importance") = nb::none())
      .def_prop_ro("shape", [](const PackedLinear& self) { return nb::make_tuple(self.rows(), self.cols()); })
      .def("unpack", &PackedLinear::unpack, nb::arg("out"));
  m.def("take_rows", &take_rows_into, nb::arg("weights"), nb::arg("rows"), nb::arg("out"));
  m.def("linear_stacked", &linear_stacked, nb::arg("x"), nb::arg("weights"), nb::arg("out"));
  m.def("linear", &linear, nb::arg("x"), nb::arg("weights"), nb::arg("outs"));

  nb::class_<PackedExperts> packed_experts(m, "PackedExperts");
  bind_bytes(packed_experts);
  packed_experts
      .def(nb::init<std::string_view, int64_t, int64_t, int64_t>(), nb::arg("format"), nb::arg("count"),
           nb::arg("hidden"), nb::arg("width"))
      .def(nb::init<Input, std::string_view, int64_t, int64_t, int64_t>(), nb::arg("bytes"),
           nb::arg("format"), nb::arg("count"), nb::arg("hidden"), nb::arg("width"))
      .def_prop_ro(
          "shape",
          [](const PackedExperts& self) { return nb::make_tuple(self.count(), self.hidden(), self.width()); })
      .def("pack", &PackedExperts::pack, nb::arg("expert"), nb::arg("gate"), nb::arg("up"), nb::arg("down"),
           nb::arg("importance") = nb::none(), nb::arg("importance_down") = nb::none())
      .def("unpack", &PackedExperts::unpack, nb::arg("expert"), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"));
  m.def("expert_layer", &expert_layer, nb::arg("x"), nb::arg("experts"), nb::arg("chosen"),
        nb::arg("weights"), nb::arg("out"));
  bind_layers(m);
}
