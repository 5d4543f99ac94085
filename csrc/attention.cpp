// Attention over a paged cache.
//
// Keys are walked in blocks of kBlockKeys, aligned to the sequence's start: a block gives each query a
// maximum, a sum and a weighted sum of values, and blocks are merged in their order. So a query has the same
// bits whether its blocks are spread over threads, as for a few queries with much behind them, or its thread
// walks them all, and whatever queries it shares a tile with.

#include "scratch.h"
#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kBlockKeys = 256;
constexpr int64_t kTileRows = 64;      // pairs of token and head that walk the keys together
constexpr int64_t kAppendTokens = 32;  // a cache line of a key's tokens in half precision
constexpr int kRowStep = kRegisters / 4;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : least(x, high); }
float* row(const Rows& rows, int64_t i) { return static_cast<float*>(rows.data) + i * rows.stride; }

// How keys and values of a type are multiplied with factors, that is queries and weights. kDepth of them make one
// step of a sum.
template <class T>
struct Arithmetic {
  using Factor = float;
  using Sum = F32;
  static constexpr int64_t kDepth = 1;
  static constexpr bool kScaled = false;
  TENFOLD_INLINE static F32 load(const T* p) { return TENFOLD_ISA::load(p); }
  TENFOLD_INLINE static F32 splat(const float* p) { return TENFOLD_ISA::splat(*p); }
  TENFOLD_INLINE static F32 add(F32 sum, F32 a, F32 b) { return fma(a, b, sum); }
  TENFOLD_INLINE static F32 load_sum(const float* p) { return TENFOLD_ISA::load(p); }
  TENFOLD_INLINE static void store_sum(float* p, F32 sum) { store(p, sum); }
};

// Factors have 16 bits here: a sum of 512 products of those with 8 bits still fits 32. It is exact.
template <>
struct Arithmetic<int8_t> {
  using Factor = int16_t;
  using Sum = I32;
  static constexpr int64_t kDepth = 2;
  static constexpr bool kScaled = true;
  TENFOLD_INLINE static I32 load(const int8_t* p) { return load_pairs(p); }
  TENFOLD_INLINE static I32 splat(const int16_t* p) { return splat_bits(p); }
  TENFOLD_INLINE static I32 add(I32 sum, I32 a, I32 b) { return add_pairs(sum, a, b); }
  TENFOLD_INLINE static I32 load_sum(const float* p) { return load_bits(p); }
  TENFOLD_INLINE static void store_sum(float* p, I32 sum) { store_bits(p, sum); }
};

template <class T>
using Factor = typename Arithmetic<T>::Factor;
template <class T>
constexpr bool kScaled = Arithmetic<T>::kScaled;

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

// What a block of keys, or all of them so far, has given to some rows.
struct Sums {
  float *most, *total;  // the largest score, and the sum of exp(score - most)
  float* values;        // [rows, K], weighted alike

  Sums from(int64_t row, int64_t dim) const { return {most + row, total + row, values + row * dim}; }
};

struct Plan {
  Plan(const Attention& op, void* scratch) : memory(scratch), tiles(op.sequences, tile_tokens(op)) {
    shared = op.heads / op.cache.kv_heads;
    rows = tile_tokens(op) * shared;
    for (int64_t n = 0; n < op.sequences.count; ++n) {
      const int64_t end = op.sequences.past[n] + op.sequences.bounds[n + 1] - op.sequences.bounds[n];
      blocks = blocks < blocks_before(end) ? blocks_before(end) : blocks;
    }
    walks = tiles.count() * op.cache.kv_heads;
    split = walks < 2 * op.threads;
    queries = memory.take<float>(op.q.rows * op.heads * op.cache.dim);
    query_scales = memory.take<float>(op.q.rows * op.heads);
    scores = memory.take<float>(op.threads * kRowStep * kBlockKeys);
    weights = memory.take<int16_t>(op.threads * kRowStep * kBlockKeys);
    so_far = take_sums(op.threads * rows, op.cache.dim);
    parts = take_sums((split ? walks * blocks : op.threads) * rows, op.cache.dim);
  }

  static int64_t tile_tokens(const Attention& op) {
    const int64_t tokens = kTileRows * op.cache.kv_heads / op.heads;
    return tokens ? tokens : 1;
  }
  static int64_t blocks_before(int64_t position) { return (position + kBlockKeys - 1) / kBlockKeys; }

  Sums take_sums(int64_t count, int64_t dim) {
    float* most = memory.take<float>(count);
    float* total = memory.take<float>(count);
    return {most, total, memory.take<float>(count * dim)};
  }

  Scratch memory;
  Tiles tiles;
  int64_t shared, rows;  // heads per key head, rows of a tile
  int64_t blocks = 0;    // that the longest sequence has
  int64_t walks;         // a tile with one key head each
  bool split;            // whether a walk's blocks are spread over threads
  float *queries, *query_scales, *scores;  // queries are int16 where keys are int8
  int16_t* weights;
  Sums so_far, parts;
};

// RMSNorm, then rotation of the pairs (i, i + rotated / 2).
void normalize_and_rotate(const Attention& op, const float* x, const float* weight, int64_t token, float* y) {
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

template <class T>
float round_to(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(x + i));
  return 1.0f;
}

// To integers of magnitude `largest_integer` at most, stored by `store_integers`; returns their unit. It is NaN
// where any x is.
template <class T, class F>
float quantize(const float* x, int64_t count, float largest_integer, T* to, const F& store_integers) {
  F32 most = splat(0), bad = splat(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    most = max(max(load(x + i), splat(0) - load(x + i)), most);
    bad = fma(load(x + i), splat(0), bad);
  }
  const float unit = largest(most) / largest_integer, inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
  for (int64_t i = 0; i < count; i += kLanes) store_integers(to + i, load(x + i) * splat(inverse));
  return unit + sum(bad);
}

float round_to(const float* x, int64_t count, int8_t* to) {
  return quantize(x, count, 127.0f, to, [](int8_t* p, F32 integers) { store_int8(p, integers); });
}

float round_to(const float* x, int64_t count, int16_t* to) {
  return quantize(x, count, 32767.0f, to, [](int16_t* p, F32 integers) { store_int16(p, integers); });
}

// Where one head of one page lies in the cache.
template <class T>
struct Page {
  Page(const PagedCache& cache, int64_t page, int64_t head) {
    const int64_t at = page * cache.kv_heads + head;
    keys = static_cast<T*>(cache.keys) + at * cache.dim * cache.page;
    values = static_cast<T*>(cache.values) + at * cache.dim * cache.page;
    if constexpr (kScaled<T>) {
      key_scales = cache.key_scales + at * cache.page;
      value_scales = cache.value_scales + at * cache.page;
    }
  }
  T *keys, *values;
  float *key_scales, *value_scales;  // where T is int8
};

// A token's key or value, rounded, as seen from its place in the page.
template <class T>
void append(const Attention& op, int64_t head, int64_t page_number, int64_t place, const float* key,
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

// Queries to scratch, [G, T, heads per key head, K], scaled; keys and values to the cache.
template <class T>
void prepare_token(const Attention& op, const Plan& plan, int64_t token, int64_t sequence, int64_t position) {
  const int64_t dim = op.cache.dim, stride = op.gated ? 2 * dim : dim;
  const F32 root = splat(1.0f / __builtin_sqrtf(static_cast<float>(dim)));
  alignas(64) float x[kMostHeadDim];
  for (int64_t h = 0; h < op.heads; ++h) {
    const int64_t at = (h / plan.shared * op.q.rows + token) * plan.shared + h % plan.shared;
    normalize_and_rotate(op, row(op.q, token) + h * stride, op.q_norm, token, x);
    for (int64_t i = 0; i < dim; i += kLanes) store(x + i, load(x + i) * root);
    plan.query_scales[at] = round_to(x, dim, reinterpret_cast<Factor<T>*>(plan.queries) + at * dim);
  }
  const int32_t page = op.sequences.pages[sequence][position / op.cache.page];
  for (int64_t g = 0; g < op.cache.kv_heads; ++g) {
    normalize_and_rotate(op, row(op.k, token) + g * dim, op.k_norm, token, x);
    append<T>(op, g, page, position % op.cache.page, x, row(op.v, token) + g * dim);
  }
}

// Some rows of a tile against one block of keys. Rows stand token by token, `shared` heads each.
template <class T>
struct Block {
  const Attention& op;
  const Factor<T>* queries;  // [rows, K]
  const float* query_scales;
  int64_t rows, shared;
  int64_t position;      // of the first row's token, counted from the block's first key
  const int32_t* pages;  // from the block's first key on
  int64_t head;
  float* scores;     // kRowStep rows of kBlockKeys, which become weights,
  int16_t* weights;  // and integers where keys are

  // How many of the block's keys a row may look at.
  int64_t visible(int64_t row) const { return clamp(position + row / shared + 1, 0, kBlockKeys); }
  Page<T> page(int64_t key) const { return {op.cache, pages[key / op.cache.page], head}; }
};

// Scores of `kRows` rows with kVectors * kLanes keys of a page, from `place` on.
template <class T, int kRows, int kVectors>
TENFOLD_INLINE void score(const Block<T>& block, const Page<T>& page, const Page<T>& next, int64_t place,
                          int64_t first_row, float* scores) {
  using A = Arithmetic<T>;
  const int64_t dim = block.op.cache.dim, stride = block.op.cache.page * A::kDepth;
  const T* keys = page.keys + place * A::kDepth;
  const Factor<T>* q = block.queries + first_row * dim;
  typename A::Sum sums[kRows][kVectors] = {};
  const int64_t to_values = page.values - page.keys, to_next = next.keys - page.keys;
  for (int64_t i = 0; i < dim; i += A::kDepth, keys += stride) {
    typename A::Sum k[kVectors];
    for (int v = 0; v < kVectors; ++v) k[v] = A::load(keys + v * kLanes * A::kDepth);
    __builtin_prefetch(keys + to_values, 0, 2);
    __builtin_prefetch(keys + to_next, 0, 2);
    for (int r = 0; r < kRows; ++r) {
      const auto x = A::splat(q + r * dim + i);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = A::add(sums[r][v], x, k[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* to = scores + r * kBlockKeys + v * kLanes;
      if constexpr (kScaled<T>) {
        const F32 unit = load(page.key_scales + place + v * kLanes) * splat(block.query_scales[first_row + r]);
        store(to, to_float(sums[r][v]) * unit);
      } else {
        store(to, sums[r][v]);
      }
    }
  }
}

template <class T, int kRows>
void score_rows(const Block<T>& block, int64_t first_row, int64_t keys) {
  const int64_t size = block.op.cache.page;
  for (int64_t first = 0; first < keys; first += size) {
    const Page<T> page = block.page(first), next = first + size < keys ? block.page(first + size) : page;
    const int64_t end = least(size, keys - first);
    for (int64_t place = 0; place < end; place += 2 * kLanes) {
      float* scores = block.scores + first + place;
      if (place + kLanes < end) {
        score<T, kRows, 2>(block, page, next, place, first_row, scores);
      } else {
        score<T, kRows, 1>(block, page, next, place, first_row, scores);
      }
    }
  }
}

// Scores become exp(score - most).
void soften(float* scores, int64_t keys, float& most, float& total) {
  const int64_t end = (keys + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = keys; i < end; ++i) scores[i] = -__builtin_inff();
  F32 peak = load(scores), sums = splat(0);
  for (int64_t i = kLanes; i < end; i += kLanes) peak = max(load(scores + i), peak);
  most = largest(peak);
  for (int64_t i = 0; i < end; i += kLanes) {
    const F32 weight = exp(load(scores + i) - splat(most));
    sums = sums + weight;
    store(scores + i, weight);
  }
  total = sum(sums);
}

// sums += weights times a page's values from key `begin` to `end`, kVectors * kLanes columns at a time.
template <class T, int kRows, int kVectors>
TENFOLD_INLINE void add_columns(const T* values, int64_t dim, const Factor<T>* weights, int64_t begin, int64_t end,
                                float* to) {
  using A = Arithmetic<T>;
  for (int64_t i = 0; i < dim; i += kVectors * kLanes) {
    typename A::Sum sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = A::load_sum(to + r * dim + i + v * kLanes);
    }
    for (int64_t key = begin; key < end; key += A::kDepth) {
      typename A::Sum x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = A::load(values + key * dim + (i + v * kLanes) * A::kDepth);
      for (int r = 0; r < kRows; ++r) {
        const auto weight = A::splat(weights + r * kBlockKeys + key);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = A::add(sums[r][v], weight, x[v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) A::store_sum(to + r * dim + i + v * kLanes, sums[r][v]);
    }
  }
}

template <class T, int kRows>
void add_page(const Block<T>& block, const Page<T>& page, const Factor<T>* weights, int64_t begin, int64_t end,
              float* to) {
  const int64_t dim = block.op.cache.dim;
  if (dim % (2 * kLanes) == 0) {
    add_columns<T, kRows, 2>(page.values, dim, weights, begin, end, to);
  } else {
    add_columns<T, kRows, 1>(page.values, dim, weights, begin, end, to);
  }
}

// The rows see a page in common, or its end is cut at a place of each row's own.
template <class T, int kRows>
void weigh_rows(const Block<T>& block, int64_t first_row, float* to) {
  const int64_t size = block.op.cache.page, dim = block.op.cache.dim;
  const int64_t common = block.visible(first_row), all = block.visible(first_row + kRows - 1);
  memset(to, 0, static_cast<size_t>(kRows * dim) * sizeof(float));
  for (int64_t first = 0; first < all; first += size) {
    const Page<T> page = block.page(first);
    const int64_t end = clamp(common - first, 0, size);
    add_page<T, kRows>(block, page, block.scores + first, 0, end, to);
    for (int r = 0; r < kRows; ++r) {
      const int64_t own = clamp(block.visible(first_row + r) - first, end, size);
      add_page<T, 1>(block, page, block.scores + r * kBlockKeys + first, end, own, to + r * dim);
    }
  }
}

// The weights of one row, times the values' scales, as integers: zero for what it may not look at.
template <class T>
float round_weights(const Block<T>& block, int64_t visible, float* scores, int16_t* weights) {
  const int64_t size = block.op.cache.page;
  for (int64_t first = 0; first < visible; first += size) {
    const Page<T> page = block.page(first);
    const int64_t end = least(size, visible - first);
    for (int64_t key = 0; key < end; ++key) scores[first + key] *= page.value_scales[key];
  }
  for (int64_t key = visible; key < kBlockKeys; ++key) scores[key] = 0;
  return round_to(scores, kBlockKeys, weights);
}

// Rows may look beyond what they see here: nothing times a weight of zero is nothing.
template <int kRows>
void weigh_rows(const Block<int8_t>& block, int64_t first_row, float* to) {
  const int64_t size = block.op.cache.page, dim = block.op.cache.dim;
  const int64_t all = block.visible(first_row + kRows - 1);
  float units[kRows];
  for (int r = 0; r < kRows; ++r) {
    units[r] = round_weights(block, block.visible(first_row + r), block.scores + r * kBlockKeys,
                             block.weights + r * kBlockKeys);
  }
  memset(to, 0, static_cast<size_t>(kRows * dim) * sizeof(float));
  for (int64_t first = 0; first < all; first += size) {
    add_page<int8_t, kRows>(block, block.page(first), block.weights + first, 0, least(size, all - first), to);
  }
  for (int r = 0; r < kRows; ++r, to += dim) {
    for (int64_t i = 0; i < dim; i += kLanes) store(to + i, to_float(load_bits(to + i)) * splat(units[r]));
  }
}

template <class T, int kRows>
void attend_rows(const Block<T>& block, int64_t first_row, const Sums& sums) {
  score_rows<T, kRows>(block, first_row, block.visible(first_row + kRows - 1));
  for (int r = 0; r < kRows; ++r) {
    soften(block.scores + r * kBlockKeys, block.visible(first_row + r), sums.most[r], sums.total[r]);
  }
  if constexpr (kScaled<T>) {
    weigh_rows<kRows>(block, first_row, sums.values);
  } else {
    weigh_rows<T, kRows>(block, first_row, sums.values);
  }
}

template <class T, int kRows>
void attend(const Block<T>& block, int64_t first_row, const Sums& sums) {
  const int64_t dim = block.op.cache.dim;
  for (; first_row + kRows <= block.rows; first_row += kRows) {
    attend_rows<T, kRows>(block, first_row, sums.from(first_row, dim));
  }
  if constexpr (kRows > 1) attend<T, kRows / 2>(block, first_row, sums);
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

  void attend_block(int64_t number, int thread, const Sums& sums) const {
    const int64_t first_key = number * kBlockKeys, buffer = thread * kRowStep * kBlockKeys;
    const int64_t query = (head * op.q.rows + tile.first) * plan.shared;
    const Block<T> block = {op,
                            reinterpret_cast<const Factor<T>*>(plan.queries) + query * op.cache.dim,
                            plan.query_scales + query,
                            rows(),
                            plan.shared,
                            tile.position - first_key,
                            op.sequences.pages[tile.sequence] + first_key / op.cache.page,
                            head,
                            plan.scores + buffer,
                            plan.weights + buffer};
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
      const float most = *a.most > *b.most ? *a.most : *b.most;
      const float old = __builtin_expf(*a.most - most), fresh = __builtin_expf(*b.most - most);
      *a.most = most;
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
          walk.attend_block(b, thread, part);
          walk.merge(b, part, so_far);
        }
        walk.finish(so_far);
      },
      op.threads);
}

template <class T>
void walk_split(const Attention& op, const Plan& plan) {
  const auto part = [&](int64_t walk, int64_t block) {
    return plan.parts.from((walk * plan.blocks + block) * plan.rows, op.cache.dim);
  };
  parallel_for(
      plan.walks * plan.blocks,
      [&](int64_t task, int thread) {
        const int64_t number = task / plan.blocks, block = task % plan.blocks;
        const Walk<T> walk(op, plan, number);
        if (block < walk.blocks()) walk.attend_block(block, thread, part(number, block));
      },
      op.threads);
  parallel_for(
      plan.walks,
      [&](int64_t task, int thread) {
        const Walk<T> walk(op, plan, task);
        const Sums so_far = plan.so_far.from(thread * plan.rows, op.cache.dim);
        for (int64_t b = 0; b < walk.blocks(); ++b) walk.merge(b, part(task, b), so_far);
        walk.finish(so_far);
      },
      op.threads);
}

template <class T>
void run(const Attention& op) {
  const Plan plan(op, op.scratch);
  const Tiles spans(op.sequences, kAppendTokens);
  parallel_for(
      spans.count(),
      [&](int64_t task, int) {
        const Tile span = spans[task];
        for (int64_t i = 0; i < span.count; ++i) {
          prepare_token<T>(op, plan, span.first + i, span.sequence, span.position + i);
        }
      },
      op.threads);
  plan.split ? walk_split<T>(op, plan) : walk_whole<T>(op, plan);
}

}  // namespace

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
