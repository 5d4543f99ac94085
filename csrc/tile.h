// Register tiles: a block of 32 packed rows times a panel of a few tokens. What the products and the experts
// are made of.
//
// A token's input is prepared once per format: int8 in groups of 32 with an fp32 scale for quantized weights,
// the instruction set's own form for bf16. A panel interleaves the inputs of its tokens group by group, [K /
// 32][tokens], so that a tile reads one stream. An output is one sum over the groups in rising order,
// whatever the panel: that is why a token's result has the same bits alone and among others.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tenfold::TENFOLD_ISA {

constexpr int kMostPanelTokens = 12;

size_t input_bytes(Format format);  // of one group of one token

// Prepares one token's K values; group g goes to `to + g * stride`.
void prepare_input(Format format, const float* x, int64_t groups, uint8_t* to, int64_t stride) noexcept;
void prepare_input(Format format, const bf16* x, int64_t groups, uint8_t* to, int64_t stride) noexcept;

// A block is gone through once for each panel of tokens that meet it.
struct Pass {
  int64_t number, count;
};

// y[t * 32 + r] = row r of the block times token t of the panel. `next` is the block that this thread reads after the
// last pass over this one: it is fetched meanwhile.
void multiply_block(Format format, const uint8_t* block, const uint8_t* next, Pass pass, const uint8_t* panel,
                    int tokens, int64_t groups, float* y) noexcept;

// Whether a single token's weights are best read two blocks at a time: in two streams, of which twice as much is under
// way, where the processor is left to foresee what comes.
bool in_pairs(Format format) noexcept;

// For one token and two neighbouring blocks: y[r] of the first, y[32 + r] of the second.
void multiply_pair(Format format, const uint8_t* blocks, const uint8_t* panel, int64_t groups,
                   float* y) noexcept;

// panel = the inputs of these tokens, taken from `inputs` [T, K / 32].
void gather_panel(Format format, const uint8_t* inputs, const int32_t* tokens, int count, int64_t groups,
                  uint8_t* panel) noexcept;

// Has the lines from `to` on brought near, to be written to. A tile's outputs lie far apart, a row of the output each: if
// they are asked for when they are stored, the stores wait for them one after another, and the next tile for the stores.
inline void fetch_to_write(void* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<char*>(to) + i, 1);
}

// `total` things cut into the fewest parts of at most `largest`, all of nearly the same size.
class Parts {
 public:
  Parts(int64_t total, int64_t largest)
      : count_((total + largest - 1) / largest),
        size_(count_ ? total / count_ : 0),
        longer_(count_ ? total % count_ : 0) {}

  int64_t count() const { return count_; }
  int64_t first(int64_t part) const { return part * size_ + (part < longer_ ? part : longer_); }
  int64_t size(int64_t part) const { return size_ + (part < longer_); }

 private:
  int64_t count_, size_, longer_;
};

// `total` things cut for so many threads: in each round every one takes half of what would be its share of the rest. So
// threads go through long runs, and end together.
class Runs {
 public:
  Runs(int64_t total, int threads) : total_(total), threads_(threads) {}

  int64_t count() const { return threads_ * kRounds; }
  int64_t first(int64_t run) const {
    const int64_t round = run / threads_, left = begin(round), each = begin(round + 1) - left;
    return left + each * (run % threads_) / threads_;
  }
  int64_t size(int64_t run) const { return first(run + 1) - first(run); }

 private:
  static constexpr int64_t kRounds = 7;
  // Where a round begins.
  int64_t begin(int64_t round) const { return round < kRounds ? total_ - (total_ >> round) : total_; }

  int64_t total_, threads_;
};

// With 16 registers six tokens share two registers of weights. For many tokens in int8, which take an instruction more to
// meet a weight, twelve share one.
inline Parts panels(Format format, int64_t tokens) {
  const bool wide = kRegisters == 32 || (format == Format::int8 && tokens > kMostPanelTokens);
  return Parts(tokens, wide ? kMostPanelTokens : kMostPanelTokens / 2);
}

}  // namespace tenfold::TENFOLD_ISA
