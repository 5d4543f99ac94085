// Attention over a paged cache.
//
// Keys are walked in blocks of kBlockKeys, aligned to the sequence's start: a block gives each query a
// maximum, a sum and a weighted sum of values, and blocks are merged in their order. So a query has the same
// bits whether its blocks are spread over threads, as for a few queries with much behind them, or its thread
// walks them all, and whatever queries it shares a tile with.

#include "attention_block.h"
#include "scratch.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kTileRows = 64;      // pairs of token and head that walk the keys together
constexpr int64_t kRunBlocks = 16;     // that a thread takes at once: it fetches the next one meanwhile
constexpr int64_t kAppendTokens = 32;  // a cache line of a key's tokens in half precision

float* row(const Rows& rows, int64_t i) { return static_cast<float*>(rows.data) + i * rows.stride; }

// Tokens of one sequence: rows first .. first + count - 1 of the step, at `position` and on.
struct Tile {
  int64_t sequence, first, position, count;
};

// Cuts the sequences of a step into tiles that begin at multiples of `size` tokens.
class Tiles {
 public:
  Tiles(const Sequences& sequences, int64_t size) : sequences_(sequences), size_(size) {}

  int64_t count() const {
    int64_t total = 0;
    for (int64_t n = 0; n < sequences_.count; ++n) total += count(n);
    return total;
  }

  Tile operator[](int64_t i) const {
    int64_t n = 0;
    for (; i >= count(n); ++n) i -= count(n);
    const int64_t past = sequences_.past[n], end = past + length(n);
    const int64_t from = past / size_ * size_ + i * size_, position = from < past ? past : from;
    return {n, sequences_.bounds[n] + position - past, position, least(from + size_, end) - position};
  }

 private:
  int64_t length(int64_t n) const { return sequences_.bounds[n + 1] - sequences_.bounds[n]; }
  int64_t count(int64_t n) const {
    const int64_t past = sequences_.past[n];
    return length(n) ? (past + length(n) - 1) / size_ - past / size_ + 1 : 0;
  }

  const Sequences& sequences_;
  int64_t size_;
};

struct Plan {
  Plan(const Attention& op, void* scratch) : memory(scratch), tiles(op.sequences, tile_tokens(op)) {
    shared = op.heads / op.cache.kv_heads;
    for (int64_t n = 0; n < op.sequences.count; ++n) {
      const int64_t tokens = op.sequences.bounds[n + 1] - op.sequences.bounds[n];
      blocks = most(blocks, blocks_before(op.sequences.past[n] + tokens));
      rows = most(rows, least(tokens, tile_tokens(op)) * shared);
    }
    walks = tiles.count() * op.cache.kv_heads;
    const bool split = walks && walks < 2 * op.threads;
    wave = split ? least(blocks, 8 * kRunBlocks * op.threads / walks) : 0;
    run = most(least(wave * walks / (4 * op.threads), kRunBlocks), 1);
    queries = memory.take<float>(op.q.rows * op.heads * op.cache.dim);
    query_scales = memory.take<float>(op.q.rows * op.heads);
    scores = memory.take<float>(op.threads * kRowStep * kBlockKeys);
    weights = memory.take<int16_t>(op.threads * kRowStep * kBlockKeys);
    so_far = take_sums((split ? walks : op.threads) * rows, op.cache.dim);
    parts = take_sums((split ? walks * wave : op.threads) * rows, op.cache.dim);
  }

  static int64_t tile_tokens(const Attention& op) {
    return most(kTileRows * op.cache.kv_heads / op.heads, 1);
  }
  static int64_t blocks_before(int64_t position) { return (position + kBlockKeys - 1) / kBlockKeys; }

  // Where a walk has its rounded weights; floats stay with the scores.
  template <class T>
  Factor<T>* weights_of(int64_t at) const {
    if constexpr (sizeof(Factor<T>) == sizeof(float))
      return scores + at;
    else
      return reinterpret_cast<Factor<T>*>(weights + at);
  }

  Sums take_sums(int64_t count, int64_t dim) {
    float* largest = memory.take<float>(count);
    float* total = memory.take<float>(count);
    return {largest, total, memory.take<float>(count * dim)};
  }

  Scratch memory;
  Tiles tiles;
  int64_t shared;                // heads per key head
  int64_t rows = 0, blocks = 0;  // of the longest tile and sequence
  int64_t walks;                 // a tile with one key head each
  int64_t wave;  // how many blocks of every walk threads share at a time; 0: a walk is one thread's
  int64_t run;   // how many of them are one task
  float *queries, *query_scales, *scores;  // queries are of type Factor
  int16_t* weights;
  Sums so_far, parts;
};

// RMSNorm, then rotation of the pairs (i, i + rotated / 2).
void normalize_and_rotate(const KeysAndValues& op, const float* x, const float* weight, int64_t token,
                          float* y) {
  const int64_t dim = op.cache.dim, half = op.rotated / 2;
  F32 squares = splat(0);
  for (int64_t i = 0; i < dim; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const F32 inverse = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + op.eps));
  for (int64_t i = 0; i < dim; i += kLanes) store(y + i, load(x + i) * inverse * load(weight + i));
  const float *cos = op.cos + token * half, *sin = op.sin + token * half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = y[i], b = y[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

// A token's key or value, rounded, as seen from its place in the page.
template <class T>
void append(const KeysAndValues& op, int64_t head, int64_t page_number, int64_t place, const float* key,
            const float* value) {
  constexpr int64_t kDepth = Arithmetic<T>::kDepth;
  const int64_t dim = op.cache.dim, size = op.cache.page;
  const Page<T> page(op.cache, page_number, head);
  alignas(64) T rounded[kMostHeadDim];
  const float key_scale = round_to(key, dim, rounded);
  for (int64_t i = 0; i < dim; ++i) {
    page.keys[(i / kDepth * size + place) * kDepth + i % kDepth] = rounded[i];
  }
  const float value_scale = round_to(value, dim, rounded);
  T* values = page.values + place / kDepth * kDepth * dim + place % kDepth;
  for (int64_t i = 0; i < dim; ++i) values[i * kDepth] = rounded[i];
  if constexpr (kScaled<T>) {
    page.key_scales[place] = key_scale;
    page.value_scales[place] = value_scale;
  }
}

template <class T>
void append_token(const KeysAndValues& op, int64_t token, int64_t sequence, int64_t position) {
  const int64_t dim = op.cache.dim;
  const int32_t page = op.sequences.pages[sequence][position / op.cache.page];
  alignas(64) float key[kMostHeadDim];
  for (int64_t g = 0; g < op.cache.kv_heads; ++g) {
    normalize_and_rotate(op, row(op.k, token) + g * dim, op.k_norm, token, key);
    append<T>(op, g, page, position % op.cache.page, key, row(op.v, token) + g * dim);
  }
}

// To scratch, [G, T, heads per key head, K], scaled.
template <class T>
void prepare_queries(const Attention& op, const Plan& plan, int64_t token) {
  const int64_t dim = op.cache.dim, stride = op.gated ? 2 * dim : dim;
  const F32 root = splat(1.0f / __builtin_sqrtf(static_cast<float>(dim)));
  alignas(64) float x[kMostHeadDim];
  for (int64_t h = 0; h < op.heads; ++h) {
    const int64_t at = (h / plan.shared * op.q.rows + token) * plan.shared + h % plan.shared;
    normalize_and_rotate(op, row(op.q, token) + h * stride, op.q_norm, token, x);
    for (int64_t i = 0; i < dim; i += kLanes) store(x + i, load(x + i) * root);
    plan.query_scales[at] = round_to(x, dim, reinterpret_cast<Factor<T>*>(plan.queries) + at * dim);
  }
}

// f(token, sequence, position) for each token of a step; one thread has those that share a cache line.
template <class F>
void for_tokens(const KeysAndValues& op, const F& f) {
  const Tiles spans(op.sequences, kAppendTokens);
  parallel_for(
      spans.count(),
      [&](int64_t task, int) {
        const Tile span = spans[task];
        for (int64_t i = 0; i < span.count; ++i) f(span.first + i, span.sequence, span.position + i);
      },
      op.threads);
}

// One tile with one key head.
template <class T>
struct Walk {
  Walk(const Attention& op, const Plan& plan, int64_t number)
      : op(op), plan(plan), tile(plan.tiles[number / op.cache.kv_heads]), head(number % op.cache.kv_heads) {}

  int64_t rows() const { return tile.count * plan.shared; }
  int64_t blocks() const { return Plan::blocks_before(tile.position + tile.count); }
  // The first row that sees any key of a block.
  int64_t first_row(int64_t block) const {
    return clamp(block * kBlockKeys - tile.position, 0, tile.count) * plan.shared;
  }

  // `end`: where the blocks end that this thread takes.
  void attend_block(int64_t number, int64_t end, int thread, const Sums& sums) const {
    const int64_t first_key = number * kBlockKeys, buffer = thread * kRowStep * kBlockKeys;
    const int64_t query = (head * op.q.rows + tile.first) * plan.shared;
    const int64_t keys = tile.position + tile.count - first_key - kBlockKeys;
    Block<T> block = {op,
                      reinterpret_cast<const Factor<T>*>(plan.queries) + query * op.cache.dim,
                      plan.query_scales + query,
                      rows(),
                      plan.shared,
                      tile.position - first_key,
                      op.sequences.pages[tile.sequence] + first_key / op.cache.page,
                      number + 1 < end ? least(keys, kBlockKeys) : 0,
                      head,
                      plan.scores + buffer,
                      plan.weights_of<T>(buffer)};
    attend<T, kRowStep>(block, first_row(number), sums);
  }

  void merge(int64_t block, const Sums& part, const Sums& so_far) const {
    const int64_t dim = op.cache.dim;
    for (int64_t r = first_row(block); r < rows(); ++r) {
      const Sums a = so_far.from(r, dim), b = part.from(r, dim);
      if (block == 0) {
        *a.most = *b.most, *a.total = *b.total;
        memcpy(a.values, b.values, static_cast<size_t>(dim) * sizeof(float));
        continue;
      }
      const float peak = *a.most > *b.most ? *a.most : *b.most;
      const float old = __builtin_expf(*a.most - peak), fresh = __builtin_expf(*b.most - peak);
      *a.most = peak;
      *a.total = *a.total * old + *b.total * fresh;
      for (int64_t i = 0; i < dim; i += kLanes) {
        store(a.values + i, fma(load(b.values + i), splat(fresh), load(a.values + i) * splat(old)));
      }
    }
  }

  void finish(const Sums& sums) const {
    const int64_t dim = op.cache.dim;
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t token = tile.first + r / plan.shared, h = head * plan.shared + r % plan.shared;
      const F32 inverse = splat(1.0f / sums.total[r]);
      const float *values = sums.values + r * dim, *gate = row(op.q, token) + (2 * h + 1) * dim;
      float* out = row(op.out, token) + h * dim;
      for (int64_t i = 0; i < dim; i += kLanes) {
        const F32 x = load(values + i) * inverse;
        store(out + i, op.gated ? x * sigmoid(load(gate + i)) : x);
      }
    }
  }

  const Attention& op;
  const Plan& plan;
  Tile tile;
  int64_t head;
};

template <class T>
void walk_whole(const Attention& op, const Plan& plan) {
  parallel_for(
      plan.walks,
      [&](int64_t task, int thread) {
        const Walk<T> walk(op, plan, plan.walks - 1 - task);  // the longest first
        const Sums part = plan.parts.from(thread * plan.rows, op.cache.dim);
        const Sums so_far = plan.so_far.from(thread * plan.rows, op.cache.dim);
        for (int64_t b = 0; b < walk.blocks(); ++b) {
          walk.attend_block(b, walk.blocks(), thread, part);
          walk.merge(b, part, so_far);
        }
        walk.finish(so_far);
      },
      op.threads);
}

// Blocks first .. first + count - 1 of all walks.
template <class T>
void walk_wave(const Attention& op, const Plan& plan, int64_t first, int64_t count) {
  const auto part = [&](int64_t walk, int64_t block) {
    return plan.parts.from((walk * plan.wave + block - first) * plan.rows, op.cache.dim);
  };
  const int64_t runs = (count + plan.run - 1) / plan.run;
  parallel_for(
      plan.walks * runs,
      [&](int64_t task, int thread) {
        const int64_t number = task / runs, begin = first + task % runs * plan.run;
        const Walk<T> walk(op, plan, number);
        const int64_t end = least(least(begin + plan.run, first + count), walk.blocks());
        for (int64_t b = begin; b < end; ++b) walk.attend_block(b, end, thread, part(number, b));
      },
      op.threads);
  parallel_for(
      plan.walks,
      [&](int64_t task, int) {
        const Walk<T> walk(op, plan, task);
        const Sums so_far = plan.so_far.from(task * plan.rows, op.cache.dim);
        const int64_t end = least(first + count, walk.blocks());
        for (int64_t b = first; b < end; ++b) walk.merge(b, part(task, b), so_far);
        if (first < end && end == walk.blocks()) walk.finish(so_far);
      },
      op.threads);
}

template <class T>
void run(const Attention& op) {
  const Plan plan(op, op.scratch);
  for_tokens(op, [&](int64_t token, int64_t sequence, int64_t position) {
    prepare_queries<T>(op, plan, token);
    append_token<T>(op, token, sequence, position);
  });
  if (!plan.wave) return walk_whole<T>(op, plan);
  for (int64_t first = 0; first < plan.blocks; first += plan.wave) {
    walk_wave<T>(op, plan, first, least(plan.wave, plan.blocks - first));
  }
}

template <class T>
void append_tokens(const KeysAndValues& op) {
  for_tokens(op, [&](int64_t token, int64_t sequence, int64_t position) {
    append_token<T>(op, token, sequence, position);
  });
}

}  // namespace

void remember(const KeysAndValues& op) noexcept {
  switch (op.cache.type) {
    case CacheType::f32: return append_tokens<float>(op);
    case CacheType::bf16: return append_tokens<bf16>(op);
    case CacheType::f16: return append_tokens<half>(op);
    case CacheType::int8: return append_tokens<int8_t>(op);
  }
}

size_t attention_scratch(const Attention& op) noexcept { return Plan(op, nullptr).memory.used(); }

void attention(const Attention& op) noexcept {
  switch (op.cache.type) {
    case CacheType::f32: return run<float>(op);
    case CacheType::bf16: return run<bf16>(op);
    case CacheType::f16: return run<half>(op);
    case CacheType::int8: return run<int8_t>(op);
  }
}

}  // namespace tenfold::TENFOLD_ISA
