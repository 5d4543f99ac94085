// Attention of some queries to one block of keys, read from their pages.
#pragma once

#include "simd.h"

namespace tenfold::TENFOLD_ISA {
namespace {

constexpr int64_t kBlockKeys = 256;
constexpr int kRowStep = kRegisters / 4;  // rows that share what is read; two sums each

TENFOLD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TENFOLD_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
TENFOLD_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : least(x, high); }

// How keys and values of a type are multiplied with factors, that is queries and weights. kDepth of them make
// one step of a sum.
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

// Factors are rounded to bf16 where an instruction multiplies pairs of those.
template <>
struct Arithmetic<bf16> {
  using Factor = PairInput;
  using Sum = F32;
  struct Pairs {
    PairWeights steps[kPairSteps];
  };
  static constexpr int64_t kDepth = 2;
  static constexpr bool kScaled = false;
  TENFOLD_INLINE static Pairs split(I32 pairs) {
    Pairs split;
    unrolled<kPairSteps>([&](auto i) TENFOLD_BODY { split.steps[i] = pair_weights(pairs, i); });
    return split;
  }
  TENFOLD_INLINE static Pairs load(const bf16* p) { return split(load_bits(p)); }
  TENFOLD_INLINE static Pairs load_first(const bf16* p) { return split(first_of_pairs(load_bits(p))); }
  TENFOLD_INLINE static Pairs splat(const Factor* p) {
    Pairs split;
    unrolled<kPairSteps>([&](auto i) TENFOLD_BODY { split.steps[i] = pair_inputs(p, i); });
    return split;
  }
  TENFOLD_INLINE static F32 add(F32 sum, const Pairs& factors, const Pairs& x) {
    unrolled<kPairSteps>([&](auto i) TENFOLD_BODY { sum = add_product(x.steps[i], factors.steps[i], sum); });
    return sum;
  }
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

template <class T>
float round_to(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(x + i));
  return 1.0f;
}

// To integers of magnitude `largest_integer` at most, stored by `store_integers`; returns their unit. It is
// NaN where any x is.
template <class T, class F>
float quantize(const float* x, int64_t count, float largest_integer, T* to, const F& store_integers) {
  F32 peak = splat(0), bad = splat(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    peak = max(max(load(x + i), splat(0) - load(x + i)), peak);
    bad = fma(load(x + i), splat(0), bad);
  }
  const float unit = largest(peak) / largest_integer, inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
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
    const int64_t at = head * cache.pages + page;
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

// What a block of keys, or all of them so far, has given to some rows.
struct Sums {
  float *most, *total;  // the largest score, and the sum of exp(score - most)
  float* values;        // [rows, K], weighted alike

  Sums from(int64_t row, int64_t dim) const { return {most + row, total + row, values + row * dim}; }
};

// Some rows of a tile against one block of keys. Rows stand token by token, `shared` heads each.
template <class T>
struct Block {
  const Attention& op;
  const Factor<T>* queries;  // [rows, K]
  const float* query_scales;
  int64_t rows, shared;
  int64_t position;      // of the first row's token, counted from the block's first key
  const int32_t* pages;  // from the block's first key on
  int64_t following;     // how many keys of the next block this thread reads next
  int64_t head;
  float* scores;       // kRowStep rows of kBlockKeys, which become weights,
  Factor<T>* weights;  // and are rounded to here, if factors are not floats

  bool cold = true;  // no rows have been here yet: what they read next is fetched, since pages lie anywhere

  // How many of the block's keys a row may look at.
  int64_t visible(int64_t row) const { return clamp(position + row / shared + 1, 0, kBlockKeys); }
  Page<T> page(int64_t key) const { return {op.cache, pages[key / op.cache.page], head}; }
  // What is read after the keys of the page at `key`, and after its values; null if that is no more to be fetched.
  const T* after_keys(int64_t key, int64_t keys) const {
    if (!cold) return nullptr;
    const int64_t next = key + op.cache.page;
    return next < keys ? page(next).keys : page(0).values;
  }
  const T* after_values(int64_t key, int64_t keys) const {
    if (!cold) return nullptr;
    const int64_t next = key + op.cache.page;
    if (next < keys) return page(next).values;
    return following > 0 ? page(kBlockKeys).keys : nullptr;
  }
};

// Has `count` elements brought nearer, unless `from` is null.
template <class T>
TENFOLD_INLINE void fetch(const T* from, int64_t at, int count) {
  if (!from) return;
  for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + at + i);
}

// Scores of `kRows` rows with kVectors * kLanes keys of a page, from `place` on. Meanwhile as much of `next` is fetched.
template <class T, int kRows, int kVectors>
TENFOLD_INLINE void score(const Block<T>& block, const Page<T>& page, int64_t place, int64_t first_row,
                          const T* next, float* scores) {
  using A = Arithmetic<T>;
  const int64_t dim = block.op.cache.dim, stride = block.op.cache.page * A::kDepth;
  const T* keys = page.keys + place * A::kDepth;
  const Factor<T>* q = block.queries + first_row * dim;
  typename A::Sum sums[kRows][kVectors] = {};
  for (int64_t i = 0; i < dim; i += A::kDepth, keys += stride) {
    decltype(A::load(keys)) k[kVectors];
    for (int v = 0; v < kVectors; ++v) k[v] = A::load(keys + v * kLanes * A::kDepth);
    fetch(next, keys - page.keys, kVectors * kLanes * A::kDepth);
    for (int r = 0; r < kRows; ++r) {
      const auto x = A::splat(q + r * dim + i);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = A::add(sums[r][v], x, k[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) A::store_sum(scores + r * kBlockKeys + v * kLanes, sums[r][v]);
  }
}

template <class T, int kRows>
void score_rows(const Block<T>& block, int64_t first_row, int64_t keys) {
  const int64_t size = block.op.cache.page;
  for (int64_t first = 0; first < keys; first += size) {
    const Page<T> page = block.page(first);
    const int64_t end = least(size, keys - first);
    const T* next = block.after_keys(first, keys);
    for (int64_t place = 0; place < end; place += 2 * kLanes) {
      float* scores = block.scores + first + place;
      if (place + kLanes < end) {
        score<T, kRows, 2>(block, page, place, first_row, next, scores);
      } else {
        score<T, kRows, 1>(block, page, place, first_row, next, scores);
      }
    }
  }
}

// Integers become scores. Not where they are summed up: gcc would carry each sum through the loop twice, as either type.
template <class T>
void scale_scores(const Block<T>& block, int64_t row, int64_t keys, float* scores) {
  const int64_t size = block.op.cache.page;
  const F32 unit = splat(block.query_scales[row]);
  for (int64_t first = 0; first < keys; first += size) {
    const float* scales = block.page(first).key_scales;
    for (int64_t i = 0; i < size && first + i < keys; i += kLanes) {
      float* at = scores + first + i;
      store(at, to_float(load_bits(at)) * (load(scales + i) * unit));
    }
  }
}

// Scores become exp(score - highest).
void soften(float* scores, int64_t keys, float& highest, float& total) {
  const int64_t end = (keys + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = keys; i < end; ++i) scores[i] = -__builtin_inff();
  F32 peak = load(scores), sums = splat(0);
  for (int64_t i = kLanes; i < end; i += kLanes) peak = max(load(scores + i), peak);
  highest = largest(peak);
  for (int64_t i = 0; i < end; i += kLanes) {
    const F32 weight = exp(load(scores + i) - splat(highest));
    sums = sums + weight;
    store(scores + i, weight);
  }
  total = sum(sums);
}

// sums += weights times a page's values from key `begin` to `end`, kVectors * kLanes columns at a time. Meanwhile as much
// of `next` is fetched.
template <class T, int kRows, int kVectors>
TENFOLD_INLINE void add_columns(const T* values, int64_t dim, const Factor<T>* weights, int64_t begin,
                                int64_t end, const T* next, float* to) {
  using A = Arithmetic<T>;
  int64_t fetched = 0;
  for (int64_t i = 0; i < dim; i += kVectors * kLanes) {
    typename A::Sum sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = A::load_sum(to + r * dim + i + v * kLanes);
    }
    for (int64_t key = begin; key < end; key += A::kDepth) {
      decltype(A::load(values)) x[kVectors];
      const int64_t at = key * dim + i * A::kDepth;
      for (int v = 0; v < kVectors; ++v) x[v] = A::load(values + at + v * kLanes * A::kDepth);
      fetch(next, fetched, kVectors * kLanes * A::kDepth);
      fetched += kVectors * kLanes * A::kDepth;
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
void add_page(const T* values, int64_t dim, const Factor<T>* weights, int64_t begin, int64_t end,
              const T* next, float* to) {
  if (begin == end) return;
  if (dim % (2 * kLanes) == 0) {
    add_columns<T, kRows, 2>(values, dim, weights, begin, end, next, to);
  } else {
    add_columns<T, kRows, 1>(values, dim, weights, begin, end, next, to);
  }
}

// sums += weight times the values of one key, without the other key of its pair.
template <class T>
void add_half_pair(const T* values, int64_t dim, const Factor<T>* weights, int64_t key, float* to) {
  using A = Arithmetic<T>;
  const auto weight = A::splat(weights + key);
  for (int64_t i = 0; i < dim; i += kLanes) {
    A::store_sum(to + i,
                 A::add(A::load_sum(to + i), weight, A::load_first(values + key * dim + i * A::kDepth)));
  }
}

// A page's values from key `begin` to `end`, for one row.
template <class T>
void add_own(const T* values, int64_t dim, const Factor<T>* weights, int64_t begin, int64_t end, float* to) {
  constexpr int64_t kDepth = Arithmetic<T>::kDepth;
  const int64_t whole = end / kDepth * kDepth;
  add_page<T, 1>(values, dim, weights, begin, whole, nullptr, to);
  if constexpr (kDepth > 1) {
    if (whole < end) add_half_pair<T>(values, dim, weights, whole, to);
  }
}

// The rows see a page in common, or its end is cut at a place of each row's own.
template <class T, int kRows>
void weigh_rows(const Block<T>& block, int64_t first_row, float* to) {
  constexpr int64_t kDepth = Arithmetic<T>::kDepth;
  const int64_t size = block.op.cache.page, dim = block.op.cache.dim;
  const int64_t common = block.visible(first_row), all = block.visible(first_row + kRows - 1);
  if constexpr (sizeof(Factor<T>) < sizeof(float)) round_to(block.scores, kRows * kBlockKeys, block.weights);
  memset(to, 0, static_cast<size_t>(kRows * dim) * sizeof(float));
  for (int64_t first = 0; first < all; first += size) {
    const T* values = block.page(first).values;
    const Factor<T>* weights = block.weights + first;
    const int64_t end = clamp(common - first, 0, size) / kDepth * kDepth;
    add_page<T, kRows>(values, dim, weights, 0, end, block.after_values(first, all), to);
    for (int r = 0; r < kRows; ++r) {
      const int64_t own = clamp(block.visible(first_row + r) - first, end, size);
      add_own<T>(values, dim, weights + r * kBlockKeys, end, own, to + r * dim);
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
    add_page<int8_t, kRows>(block.page(first).values, dim, block.weights + first, 0, least(size, all - first),
                            block.after_values(first, all), to);
  }
  for (int r = 0; r < kRows; ++r, to += dim) {
    for (int64_t i = 0; i < dim; i += kLanes) store(to + i, to_float(load_bits(to + i)) * splat(units[r]));
  }
}

template <class T, int kRows>
void attend_rows(const Block<T>& block, int64_t first_row, const Sums& sums) {
  score_rows<T, kRows>(block, first_row, block.visible(first_row + kRows - 1));
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kScaled<T>) {
      scale_scores<T>(block, first_row + r, block.visible(first_row + r), block.scores + r * kBlockKeys);
    }
    soften(block.scores + r * kBlockKeys, block.visible(first_row + r), sums.most[r], sums.total[r]);
  }
  if constexpr (kScaled<T>) {
    weigh_rows<kRows>(block, first_row, sums.values);
  } else {
    weigh_rows<T, kRows>(block, first_row, sums.values);
  }
}

template <class T, int kRows>
void attend(Block<T>& block, int64_t first_row, const Sums& sums) {
  const int64_t dim = block.op.cache.dim;
  for (; first_row + kRows <= block.rows; first_row += kRows) {
    attend_rows<T, kRows>(block, first_row, sums.from(first_row, dim));
    block.cold = false;
  }
  if constexpr (kRows > 1) attend<T, kRows / 2>(block, first_row, sums);
}

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
