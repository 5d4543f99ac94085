// Products with packed weights.

#include "scratch.h"
#include "tile.h"

namespace tenfold::TENFOLD_ISA {
namespace {

int64_t groups(const Product& product) { return product.x.cols / kGroup; }

// All weights of a product take the same form of input: all are bf16, or none.
size_t group_input_bytes(const Product& product) { return input_bytes(product.weights[0].format); }

template <class T>
void prepare_panel(const Product& product, const Parts& panels, int64_t panel, uint8_t* inputs) {
  const int64_t bytes = static_cast<int64_t>(group_input_bytes(product));
  const int64_t first = panels.first(panel), tokens = panels.size(panel);
  uint8_t* to = inputs + first * groups(product) * bytes;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* x = static_cast<const T*>(product.x.data) + (first + t) * product.x.stride;
    prepare_input(product.weights[0].format, x, groups(product), to + t * bytes, tokens * bytes);
  }
}

template <class T>
void store_rows(const float* y, T* out, int64_t rows) {
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) store(out + r, load(y + r));
  if (r == rows) return;
  T tail[kLanes];
  store(tail, load(y + r));
  memcpy(out + r, tail, static_cast<size_t>(rows - r) * sizeof(T));
}

template <class T>
void store_tile(const float* y, const Rows& out, int64_t token, int tokens, int64_t row) {
  const int64_t rows = out.cols - row < kBlockRows ? out.cols - row : kBlockRows;
  for (int t = 0; t < tokens; ++t) {
    store_rows(y + t * kBlockRows, static_cast<T*>(out.data) + (token + t) * out.stride + row, rows);
  }
}

// What store_tile is going to write.
void fetch_tile(const Rows& out, int64_t token, int tokens, int64_t row) {
  const int64_t size = out.dtype == DType::f32 ? sizeof(float) : sizeof(bf16);
  for (int t = 0; t < tokens; ++t) {
    fetch_to_write(static_cast<char*>(out.data) + ((token + t) * out.stride + row) * size, kBlockRows * size);
  }
}

void multiply_rows(const Product& product, const Parts& panels, const uint8_t* inputs, int64_t weight,
                   int64_t block) {
  const PackedMatrix& w = product.weights[weight];
  const Rows& out = product.outputs[weight];
  const uint8_t* rows = w.data + block * block_bytes(w.format, w.cols);
  const uint8_t* next = rows + block_bytes(w.format, w.cols);
  for (int64_t p = 0; p < panels.count(); ++p) {
    alignas(64) float y[kMostPanelTokens * kBlockRows];
    const int64_t first = panels.first(p);
    const int tokens = static_cast<int>(panels.size(p));
    const uint8_t* panel =
        inputs + first * groups(product) * static_cast<int64_t>(group_input_bytes(product));
    fetch_tile(out, first, tokens, block * kBlockRows);
    multiply_block(w.format, rows, next, {p, panels.count()}, panel, tokens, groups(product), y);
    const auto store = out.dtype == DType::f32 ? store_tile<float> : store_tile<bf16>;
    store(y, out, first, tokens, block * kBlockRows);
  }
}

// Two neighbouring blocks for a single token.
void multiply_rows_of_one(const Product& product, const uint8_t* inputs, int64_t weight, int64_t block) {
  const PackedMatrix& w = product.weights[weight];
  const Rows& out = product.outputs[weight];
  const int64_t each = block_bytes(w.format, w.cols);
  alignas(64) float y[2 * kBlockRows];
  const uint8_t* rows = w.data + block * each;
  multiply_pair(w.format, rows, inputs, groups(product), y);
  const auto store = out.dtype == DType::f32 ? store_tile<float> : store_tile<bf16>;
  store(y, out, 0, 1, block * kBlockRows);
  store(y + kBlockRows, out, 0, 1, (block + 1) * kBlockRows);
}

int64_t total_blocks(const Product& product) {
  int64_t total = 0;
  for (int64_t i = 0; i < product.count; ++i) total += blocks(product.weights[i].rows);
  return total;
}

// Blocks first .. first + count - 1 of all weights, one weight after another.
void multiply_run(const Product& product, const Parts& panels, const uint8_t* inputs, int64_t first,
                  int64_t count) {
  int64_t weight = 0, block = first;
  for (int64_t i = 0; i < count;) {
    for (; block >= blocks(product.weights[weight].rows); ++weight)
      block -= blocks(product.weights[weight].rows);
    const PackedMatrix& w = product.weights[weight];
    const bool pair =
        product.x.rows == 1 && in_pairs(w.format) && i + 1 < count && block + 1 < blocks(w.rows);
    if (pair) {
      multiply_rows_of_one(product, inputs, weight, block);
    } else {
      multiply_rows(product, panels, inputs, weight, block);
    }
    i += pair ? 2 : 1, block += pair ? 2 : 1;
  }
}

}  // namespace

size_t product_scratch(const Product& product) noexcept {
  return static_cast<size_t>(product.x.rows * groups(product)) * group_input_bytes(product);
}

void product(const Product& product) noexcept {
  auto* inputs = static_cast<uint8_t*>(product.scratch);
  const Parts panels = TENFOLD_ISA::panels(product.weights[0].format, product.x.rows);
  parallel_for(panels.count(), [&](int64_t panel, int) {
    const auto prepare = product.x.dtype == DType::f32 ? prepare_panel<float> : prepare_panel<bf16>;
    prepare(product, panels, panel, inputs);
  });
  const Runs runs(total_blocks(product), threads());
  parallel_for(runs.count(), [&](int64_t run, int) {
    multiply_run(product, panels, inputs, runs.first(run), runs.size(run));
  });
}

}  // namespace tenfold::TENFOLD_ISA
