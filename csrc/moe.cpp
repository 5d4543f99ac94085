// The expert layer: tokens grouped by expert, gate, up and SwiGLU in one pass, then down with the weighted
// sum.
//
// Both passes run over spans: some tokens of one expert, few enough that their inputs stay in the cache while
// the expert's weights pass by. The first pass shares out spans (and for a few tokens the rows of a span);
// the second shares out rows of the output and walks the experts in rising order, so that no thread waits for
// another to add.

#include "scratch.h"
#include "tile.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kSpanTokens = 8 * kMostPanelTokens;

// Entries first .. first + count - 1 of the tokens grouped by expert, all of one expert.
struct Span {
  const uint8_t* expert;
  int64_t first, count;
};

// A layer's intermediate results. An entry is a token and one of its experts; entries stand in order of the
// expert.
struct Plan {
  explicit Plan(const ExpertLayer& layer, void* scratch) : memory(scratch) {
    const int64_t entries = layer.x.rows * layer.choices;
    inputs = memory.take<uint8_t>(layer.x.rows * hidden_groups(layer) * bytes(layer));
    gathered = memory.take<uint8_t>(layer.threads * kSpanTokens * hidden_groups(layer) * bytes(layer));
    activations = memory.take<uint8_t>(entries * width_groups(layer) * bytes(layer));
    sums = layer.out.dtype == DType::f32 ? nullptr : memory.take<float>(layer.out.rows * layer.out.cols);
    ends = memory.take<int64_t>(layer.count);
    tokens = memory.take<int32_t>(entries);
    weights = memory.take<float>(entries);
    spans = memory.take<Span>(entries);
  }

  static int64_t bytes(const ExpertLayer& layer) { return static_cast<int64_t>(input_bytes(layer.format)); }
  static int64_t hidden_groups(const ExpertLayer& layer) { return layer.x.cols / kGroup; }
  static int64_t width_groups(const ExpertLayer& layer) { return layer.width / kGroup; }

  Scratch memory;
  uint8_t *inputs, *gathered, *activations;
  float* sums;
  int64_t* ends;
  int32_t* tokens;
  float* weights;
  Span* spans;
  int64_t span_count = 0;
};

// Counting sort of the choices by expert; a token keeps its place among those of an expert.
void group_by_expert(const ExpertLayer& layer, Plan& plan) {
  const int64_t entries = layer.x.rows * layer.choices;
  memset(plan.ends, 0, static_cast<size_t>(layer.count) * sizeof(int64_t));
  for (int64_t i = 0; i < entries; ++i) ++plan.ends[layer.chosen[i]];
  int64_t begin = 0;
  for (int64_t e = 0; e < layer.count; ++e) {
    const int64_t count = plan.ends[e];
    const Parts parts(count, kSpanTokens);
    for (int64_t i = 0; i < parts.count(); ++i) {
      plan.spans[plan.span_count++] = {layer.experts[e], begin + parts.first(i), parts.size(i)};
    }
    plan.ends[e] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < entries; ++i) {
    const int64_t entry = plan.ends[layer.chosen[i]]++;
    plan.tokens[entry] = static_cast<int32_t>(i / layer.choices);
    plan.weights[entry] = layer.weights[i];
  }
}

void prepare_token(const ExpertLayer& layer, const Plan& plan, int64_t token) {
  const int64_t groups = Plan::hidden_groups(layer), bytes = Plan::bytes(layer), at = token * layer.x.stride;
  uint8_t* to = plan.inputs + token * groups * bytes;
  if (layer.x.dtype == DType::f32) {
    prepare_input(layer.format, static_cast<const float*>(layer.x.data) + at, groups, to, bytes);
  } else {
    prepare_input(layer.format, static_cast<const bf16*>(layer.x.data) + at, groups, to, bytes);
  }
}

// The span's inputs as panels; those of a single token are one already.
const uint8_t* gather(const ExpertLayer& layer, const Plan& plan, const Span& span, int thread) {
  const int64_t groups = Plan::hidden_groups(layer), bytes = Plan::bytes(layer);
  const int32_t* tokens = plan.tokens + span.first;
  if (span.count == 1) return plan.inputs + tokens[0] * groups * bytes;
  uint8_t* to = plan.gathered + thread * kSpanTokens * groups * bytes;
  const Parts parts = panels(layer.format, span.count);
  for (int64_t p = 0; p < parts.count(); ++p) {
    const int64_t first = parts.first(p);
    gather_panel(layer.format, plan.inputs, tokens + first, static_cast<int>(parts.size(p)), groups,
                 to + first * groups * bytes);
  }
  return to;
}

// 32 activations of each of a panel's tokens: one group of down's input.
void activate(const ExpertLayer& layer, const float* gate, const float* up, int64_t tokens, uint8_t* to) {
  alignas(64) float h[kMostPanelTokens * kBlockRows];
  for (int64_t i = 0; i < tokens * kBlockRows; i += kLanes) {
    store(h + i, silu(load(gate + i)) * load(up + i));
  }
  prepare_input(layer.format, h, tokens, to, Plan::bytes(layer));
}

const uint8_t* gate_rows(const ExpertLayer& layer, const Span& span, int64_t block) {
  return span.expert + 2 * block * block_bytes(layer.format, layer.x.cols);
}

void gate_up_block(const ExpertLayer& layer, const Plan& plan, const Span& span, const uint8_t* inputs,
                   int64_t block, const uint8_t* next) {
  const int64_t groups = Plan::hidden_groups(layer), bytes = Plan::bytes(layer);
  const int64_t each = block_bytes(layer.format, layer.x.cols);
  const uint8_t *rows = gate_rows(layer, span, block), *up_rows = rows + each;
  const Parts parts = panels(layer.format, span.count);
  for (int64_t p = 0; p < parts.count(); ++p) {
    alignas(64) float gate[kMostPanelTokens * kBlockRows], up[kMostPanelTokens * kBlockRows];
    const int64_t first = parts.first(p), tokens = parts.size(p);
    const uint8_t* panel = inputs + first * groups * bytes;
    if (tokens == 1 && in_pairs(layer.format)) {
      alignas(64) float both[2 * kBlockRows];
      multiply_pair(layer.format, rows, panel, groups, both);
      memcpy(gate, both, sizeof both / 2), memcpy(up, both + kBlockRows, sizeof both / 2);
    } else {
      const bool once = parts.count() == 1;  // gate, then up; several passes go over both in turns
      const int count = static_cast<int>(tokens);
      const Pass pass = {p, parts.count()};
      multiply_block(layer.format, rows, once ? up_rows : next, pass, panel, count, groups, gate);
      multiply_block(layer.format, up_rows, once ? next : next + each, pass, panel, count, groups, up);
    }
    uint8_t* to =
        plan.activations + ((span.first + first) * Plan::width_groups(layer) + block * tokens) * bytes;
    activate(layer, gate, up, tokens, to);
  }
}

// Blocks first .. first + count - 1 of all spans, one span after another.
void gate_up_run(const ExpertLayer& layer, const Plan& plan, int64_t first, int64_t count, int thread) {
  const int64_t blocks = Plan::width_groups(layer);
  const uint8_t* inputs = nullptr;
  for (int64_t i = first; i < first + count; ++i) {
    const Span& span = plan.spans[i / blocks];
    const int64_t block = i % blocks, following = i + 1 < first + count ? i + 1 : i;
    if (i == first || block == 0) inputs = gather(layer, plan, span, thread);
    const uint8_t* next = gate_rows(layer, plan.spans[following / blocks], following % blocks);
    gate_up_block(layer, plan, span, inputs, block, next);
  }
}

void gate_up(const ExpertLayer& layer, const Plan& plan) {
  const Runs runs(plan.span_count * Plan::width_groups(layer), layer.threads);
  parallel_for(
      runs.count(),
      [&](int64_t run, int thread) { gate_up_run(layer, plan, runs.first(run), runs.size(run), thread); },
      layer.threads);
}

// Where the sums of a token's output grow in fp32.
struct Output {
  float* data;
  int64_t stride;
};

const uint8_t* down_rows(const ExpertLayer& layer, const Span& span, int64_t block) {
  return span.expert + 2 * packed_bytes(layer.format, layer.width, layer.x.cols) +
         block * block_bytes(layer.format, layer.width);
}

void down_block(const ExpertLayer& layer, const Plan& plan, const Span& span, int64_t block,
                const uint8_t* next, const Output& out) {
  const int64_t groups = Plan::width_groups(layer);
  const uint8_t* rows = down_rows(layer, span, block);
  const Parts parts = panels(layer.format, span.count);
  for (int64_t p = 0; p < parts.count(); ++p) {
    alignas(64) float y[kMostPanelTokens * kBlockRows];
    const int64_t first = span.first + parts.first(p), tokens = parts.size(p);
    const uint8_t* panel = plan.activations + first * groups * Plan::bytes(layer);
    for (int64_t t = 0; t < tokens; ++t) {
      fetch_to_write(out.data + plan.tokens[first + t] * out.stride + block * kBlockRows,
                     kBlockRows * sizeof(float));
    }
    multiply_block(layer.format, rows, next, {p, parts.count()}, panel, static_cast<int>(tokens), groups, y);
    for (int64_t t = 0; t < tokens; ++t) {
      float* sum = out.data + plan.tokens[first + t] * out.stride + block * kBlockRows;
      const F32 weight = splat(plan.weights[first + t]);
      for (int i = 0; i < kBlockRows; i += kLanes) {
        store(sum + i, fma(weight, load(y + t * kBlockRows + i), load(sum + i)));
      }
    }
  }
}

void round_output(const ExpertLayer& layer, const Output& sums, int64_t col, int64_t cols) {
  for (int64_t t = 0; t < layer.out.rows; ++t) {
    bf16* to = static_cast<bf16*>(layer.out.data) + t * layer.out.stride + col;
    for (int64_t i = 0; i < cols; i += kLanes) store(to + i, load(sums.data + t * sums.stride + col + i));
  }
}

void down(const ExpertLayer& layer, const Plan& plan) {
  const Output out = plan.sums ? Output{plan.sums, layer.out.cols}
                               : Output{static_cast<float*>(layer.out.data), layer.out.stride};
  const Runs parts(layer.out.cols / kBlockRows, layer.threads);
  parallel_for(parts.count(), [&](int64_t part, int) {
    const int64_t first = parts.first(part), count = parts.size(part), col = first * kBlockRows;
    for (int64_t t = 0; t < layer.out.rows; ++t) {
      memset(out.data + t * out.stride + col, 0, static_cast<size_t>(count * kBlockRows) * sizeof(float));
    }
    for (int64_t s = 0; s < plan.span_count; ++s) {
      const Span &span = plan.spans[s], &following = plan.spans[s + 1 < plan.span_count ? s + 1 : s];
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* next =
            i + 1 < count ? down_rows(layer, span, first + i + 1) : down_rows(layer, following, first);
        down_block(layer, plan, span, first + i, next, out);
      }
    }
    if (plan.sums) round_output(layer, out, col, count * kBlockRows);
  });
}

}  // namespace

size_t expert_layer_scratch(const ExpertLayer& layer) noexcept { return Plan(layer, nullptr).memory.used(); }

void expert_layer(const ExpertLayer& layer) noexcept {
  Plan plan(layer, layer.scratch);
  group_by_expert(layer, plan);
  parallel_for(layer.x.rows, [&](int64_t token, int) { prepare_token(layer, plan, token); });
  gate_up(layer, plan);
  down(layer, plan);
}

}  // namespace tenfold::TENFOLD_ISA
