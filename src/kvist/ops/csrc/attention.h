// Attention in splits of 512 keys at absolute positions, whatever keys and values are made of.
//
// Per split and row: all scores, their maximum, the exponentials and their sum, the weighted values. The splits of a
// row are merged first to last (online softmax, arXiv 1805.02867), by whoever does them: a task that walks them in
// order, or the one among several tasks that finishes last. plan.h says how the work is cut.
#pragma once

#include <atomic>
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "fetch.h"
#include "plan.h"
#include "vec.h"

namespace kvist {

constexpr int64_t kScoreStride = kSplit + kLanes;  // off the power of two, where rows would share their cache sets
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What a row knows after some of its keys, in floats: `width` unnormalized outputs, then the maximum, then the sum.
struct State {
  int64_t width;  // the head dim in whole vectors

  explicit State(int64_t head_dim) : width((head_dim + kLanes - 1) / kLanes * kLanes) {}
  int64_t stride() const { return width + kLanes; }
  float& maximum(float* state) const { return state[width]; }
  float& sum(float* state) const { return state[width + 1]; }
  float maximum(const float* state) const { return state[width]; }
  float sum(const float* state) const { return state[width + 1]; }
};

// One split of a group: row `r` of each head sees its keys from `hidden[r]` to `visible[r]`, both no less than those of
// the row before it. Rows before `first` see none, nor do those from `last` on, whose windows begin later, nor, where
// they see whole blocks, some in between. Keys before `begin`, where a block begins, are seen by none and not read. The
// scores of a row, later its weights, are kScoreStride apart, head after head.
struct Split {
  const Group& group;
  int64_t start;  // its first token
  int64_t first, last;
  int64_t begin;
  int64_t visible[kGroupRows], hidden[kGroupRows];

  int64_t seen() const { return visible[last - 1]; }
  int64_t rows() const { return last - first; }  // of each head
  bool sees(int64_t row) const { return visible[row] > hidden[row]; }
};

// The keys of a call.
class Keys {
 public:
  virtual ~Keys() = default;
  // The group's queries as `score` wants them: at most the stride of a State of key_dim floats each,
  // head after head.
  virtual void load_queries(const Group& group, float* queries) const = 0;
  // Products of one head's rows from split.first on with the keys that the last row sees, not yet scaled.
  virtual void score(const Split& split, int64_t head, const float* queries, float* scores, Fetcher& fetcher) const = 0;
  virtual int64_t head_bytes() const = 0;  // in one block
  // Adds what is read of the group's heads in the block that holds the token.
  virtual void add_reads(const Group& group, int64_t token, Reads& reads) const = 0;
};

// The values of a call.
class Values {
 public:
  virtual ~Values() = default;
  // Turns the scores of one row, of which it sees `seen`, into weights in place; maximum and sum go into its state.
  virtual void soften(float* scores, int64_t hidden, int64_t seen, float* state, Fetcher& fetcher) const = 0;
  // The values of all heads, weighted, into the states.
  virtual void weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const = 0;
  virtual int64_t head_bytes() const = 0;
  virtual void add_reads(const Group& group, int64_t token, Reads& reads) const = 0;
};

// What becomes of rows that have seen all their keys.
class Result {
 public:
  virtual ~Result() = default;
  virtual void finish(const Group& group, const float* states) const = 0;
};

class Attention {
 public:
  Attention(const Batch& batch, const Keys& keys, const Values& values, const Result& result);
  void run() const;

 private:
  struct Scratch {  // a thread's own memory; rows are those of one group, head by head
    float* queries;
    float* scores;
    float* part;  // states of one split
    float* sum;   // states of all splits so far
  };

  // `next`: what this thread will probably do afterwards, or null.
  void work(Task task, const Task* next, const Scratch& scratch, float* kept, std::atomic<int64_t>& unfinished) const;
  void attend(Task task, const Task* next, const Scratch& scratch, float* states) const;
  Split split_of(Task task) const;
  template <class Side>
  Reads reads_of(const Side& side, Task task) const;
  void merge(float* sum, const float* part) const;

  const Batch& batch_;
  const Keys& keys_;
  const Values& values_;
  const Result& result_;
  const State state_;
  const Plan plan_;
};

// f(i, chain) for every sixteenth i below `count`. The chains, which take turns, hide each other's latency.
constexpr int kChains = 4;
template <class F>
inline void in_chains(int64_t count, F f) {
  int64_t i = 0;
  for (; i + (kChains - 1) * kLanes < count; i += kChains * kLanes)
    KVIST_UNROLL for (int c = 0; c < kChains; c++) f(i + c * kLanes, c);
  KVIST_UNROLL for (int c = 0; c < kChains - 1; c++, i += kLanes)
    if (i < count) f(i, c);
}

// How scores become exponents of two: scaled and, unless `cap` is 0, held within it.
struct Softening {
  explicit Softening(const Batch& batch) : scale(batch.binary_scale()), cap(batch.binary_softcap()) {}
  float scale, cap;
};

// tanh x = 1 - 2 / (1 + e^2x), to an absolute error of 1e-7.
inline void cap_scores(float* scores, int64_t first, int64_t seen, Softening how) {
  const Vec inner = set1(2.0f * how.scale / how.cap), outer = set1(how.cap), one = set1(1.0f), two = set1(2.0f);
  for (int64_t i = first / kLanes * kLanes; i < seen; i += kLanes)
    store(scores + i, outer * (one - two / (one + exp(load(scores + i) * inner))));
}

// The first pass over the scores of a row: their maximum, scaled. Keys before `hidden` and beyond `seen` get -inf before
// anything looks at them: whatever was stored there has no influence. `store` takes the index of sixteen weights, and
// the weights.
template <class Store>
inline void soften_scores(float* scores, int64_t hidden, int64_t seen, Softening how, float* maximum_and_sum,
                          Store store_weights) {
  if (how.cap != 0) cap_scores(scores, hidden, seen, how);
  const float scale = how.cap != 0 ? 1.0f : how.scale;
  // From the split's first key on, so that a row's sums do not depend on where others' windows begin.
  std::fill_n(scores, hidden, -kInfinity);
  const int64_t whole = seen / kLanes * kLanes;
  if (whole < seen) store(scores + whole, first_lanes(load(scores + whole), seen - whole, set1(-kInfinity)));
  Vec top[kChains], total[kChains];
  KVIST_UNROLL for (int c = 0; c < kChains; c++) top[c] = set1(-kInfinity), total[c] = zero();
  in_chains(seen, [&](int64_t i, int c) { top[c] = larger(top[c], load(scores + i)); });
  const float peak = maximum(larger(larger(top[0], top[1]), larger(top[2], top[3]))) * scale;
  const Vec scales = set1(scale), below = set1(-peak);
  in_chains(seen, [&](int64_t i, int c) {
    const Vec weight = exp2(fma(load(scores + i), scales, below));
    total[c] = total[c] + weight;
    store_weights(i, weight);
  });
  maximum_and_sum[0] = peak;
  maximum_and_sum[1] = sum((total[0] + total[1]) + (total[2] + total[3]));
}

// log2 of the sum of exp over what a row has seen.
inline float log_sum(const State& state, const float* row) {
  return state.maximum(row) + std::log2(state.sum(row));
}

}  // namespace kvist
