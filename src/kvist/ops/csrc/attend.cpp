// Attention in splits of 512 keys at absolute positions. attend.h says what it computes, plan.h how the work is cut,
// product.h how a row's sums are ordered.
//
// Per split and row: all scores, their maximum, the exponentials and their sum, the weighted values. The splits of a
// row are merged first to last (online softmax, arXiv 1805.02867), by whoever does them: a task that walks them in
// order, or the one among several tasks that finishes last.
#include "attend.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>

#include "plan.h"
#include "product.h"

namespace kvist {
namespace {

constexpr int64_t kScoreStride = kSplit + kLanes;  // off the power of two, where rows would share their cache sets
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Deleter {
  void operator()(float* buffer) const { ::operator delete[](buffer, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], Deleter>;

Buffer make_buffer(int64_t count) {
  return Buffer(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}

template <class Plane>
class Attention {
  using Unit = typename Plane::Unit;
  using Scalar = typename Plane::Scalar;

  // A thread's own memory; rows are those of one group, head by head.
  struct Scratch {
    Scalar* queries;  // [rows, width / kPack]
    float* scores;    // [rows, kScoreStride], later the weights as scalars
    float* part;      // states of one split
    float* sum;       // states of all splits so far
  };

 public:
  explicit Attention(const AttendCall& call)
      : call_(call),
        heads_per_kv_(call.query_heads / call.heads),
        width_((call.head_dim + kLanes - 1) / kLanes * kLanes),
        state_(width_ + kLanes),
        block_units_(call.block_size * call.head_dim),
        scale_(static_cast<float>(call.scale * 1.4426950408889634)),
        plan_(make_plan(call, at::get_num_threads())) {}

  void run() const {
    const int64_t per_thread = plan_.largest * (width_ + kScoreStride + 2 * state_);
    const Buffer memory = make_buffer(plan_.threads * per_thread), kept = make_buffer(plan_.kept_rows * state_);
    const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[plan_.groups.size()]);
    for (size_t i = 0; i < plan_.groups.size(); i++) unfinished[i] = plan_.groups[i].splits;
    std::atomic<size_t> next{0};
    // Each thread takes half of its share of what is left: at first tasks whose memory adjoins, which is read faster,
    // at the end one at a time, since tasks differ in cost.
    at::parallel_for(0, plan_.threads, 1, [&](int64_t thread, int64_t) {
      float* mine = memory.get() + thread * per_thread;
      const Scratch scratch{reinterpret_cast<Scalar*>(mine), mine + plan_.largest * width_,
                            mine + plan_.largest * (width_ + kScoreStride),
                            mine + plan_.largest * (width_ + kScoreStride + state_)};
      const size_t count = plan_.tasks.size();
      for (size_t begin = next; begin < count; begin = next) {
        const size_t end = begin + std::max<size_t>(1, (count - begin) / (2 * plan_.threads));
        if (!next.compare_exchange_weak(begin, end)) continue;
        for (size_t i = begin; i < end; i++)
          work(plan_.tasks[i], scratch, kept.get(), unfinished[plan_.tasks[i].group]);
      }
    });
  }

 private:
  void work(Task task, const Scratch& scratch, float* kept, std::atomic<int64_t>& unfinished) const;
  void load_queries(const Group& group, Scalar* queries) const;
  void attend_split(const Group& group, int64_t split, const Scratch& scratch, float* out) const;
  void multiply_keys(const Group& group, int64_t split, int64_t first, const Scratch& scratch) const;
  void soften(float* scores, int64_t seen, float* state) const;
  void multiply_values(const Group& group, int64_t token, int64_t count, Product<Plane> product) const;
  void merge(float* sum, const float* part) const;
  void finish(const Group& group, const float* sum) const;

  // How many keys of the split the row of any head sees: at most 512, 0 or less when the row ends before.
  int64_t visible(const Group& group, int64_t row, int64_t split) const {
    const int64_t token = (group.first_row + row) / heads_per_kv_;
    const int64_t position = call_.lengths[group.sequence] - call_.queries(group.sequence) + token;
    return std::min(position + 1 - split * kSplit, kSplit);
  }

  // The first row that sees anything of the split; so do all after it.
  int64_t first_seeing(const Group& group, int64_t split) const {
    int64_t row = 0;
    while (visible(group, row, split) <= 0) row++;
    return row;
  }

  // The group's first head in the block that holds the token.
  const Unit* block(const void* plane, const Group& group, int64_t token) const {
    const int64_t id = call_.tables[group.sequence * call_.table_stride + token / call_.block_size];
    return static_cast<const Unit*>(plane) + (id * call_.heads + group.head) * block_units_;
  }

  // Calls f(offset in q or the output, index in the group) for each row of each head.
  template <class F>
  void each_row(const Group& group, int64_t token_stride, F f) const {
    for (int64_t head = 0; head < group.heads; head++) {
      for (int64_t row = 0; row < group.rows; row++) {
        const int64_t token = call_.starts[group.sequence] + (group.first_row + row) / heads_per_kv_;
        const int64_t query_head = (group.head + head) * heads_per_kv_ + (group.first_row + row) % heads_per_kv_;
        f(token * token_stride + query_head * call_.head_dim, head * group.rows + row);
      }
    }
  }

  const AttendCall& call_;
  const int64_t heads_per_kv_;
  const int64_t width_;  // the head dim in whole vectors
  // What a row knows after some of its keys, in floats: `width` unnormalized outputs, then the maximum, then the sum.
  const int64_t state_;
  const int64_t block_units_;  // of one head
  const float scale_;          // times log2(e): maxima and exponents are binary
  const Plan plan_;
};

template <class Plane>
void Attention<Plane>::work(Task task, const Scratch& scratch, float* kept, std::atomic<int64_t>& unfinished) const {
  const Group& group = plan_.groups[task.group];
  const int64_t rows = group.all_rows();
  const bool cut = task.split >= 0;
  const auto part = [&](int64_t split) { return cut ? kept + (group.kept + split * rows) * state_ : scratch.part; };
  load_queries(group, scratch.queries);
  if (cut) {
    attend_split(group, task.split, scratch, part(task.split));
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  }
  std::fill_n(scratch.sum, rows * state_, 0.0f);
  for (int64_t row = 0; row < rows; row++) scratch.sum[row * state_ + width_] = -kInfinity;
  for (int64_t split = 0; split < group.splits; split++) {
    if (!cut) attend_split(group, split, scratch, part(split));
    const int64_t first = first_seeing(group, split);
    for (int64_t head = 0; head < group.heads; head++)
      for (int64_t row = head * group.rows + first; row < (head + 1) * group.rows; row++)
        merge(scratch.sum + row * state_, part(split) + row * state_);
  }
  finish(group, scratch.sum);
}

template <class Plane>
void Attention<Plane>::load_queries(const Group& group, Scalar* queries) const {
  each_row(group, call_.q_stride, [&](int64_t offset, int64_t row) {
    with_type(call_.q_type, [&](auto kind) {
      const auto* from = static_cast<const decltype(kind)*>(call_.q) + offset;
      for (int64_t i = 0; i < width_; i += kLanes)
        Plane::store_scalars(queries + (row * width_ + i) / Plane::kPack,
                             load_first(from + i, call_.head_dim - i));
    });
  });
}

// One split, for the rows that see any of it, into their states.
template <class Plane>
void Attention<Plane>::attend_split(const Group& group, int64_t split, const Scratch& scratch, float* out) const {
  const int64_t first = first_seeing(group, split), start = split * kSplit;
  multiply_keys(group, split, first, scratch);
  for (int64_t head = 0; head < group.heads; head++)
    for (int64_t row = first; row < group.rows; row++)
      soften(scratch.scores + (head * group.rows + row) * kScoreStride, visible(group, row, split),
             out + (head * group.rows + row) * state_);
  const Unit* after = split + 1 < group.splits ? block(call_.keys, group, start + kSplit) : nullptr;
  const auto weigh = [&](int64_t row, int64_t rows, int64_t from, int64_t to) {
    for (int64_t key = from; key < to;) {
      const int64_t count = std::min(to - key, call_.block_size - (start + key) % call_.block_size);
      Product<Plane> product;
      product.scalars = reinterpret_cast<const Scalar*>(scratch.scores + row * kScoreStride) + key / Plane::kPack;
      product.out = out + row * state_;
      product.rows = rows;
      product.fresh = key == 0;
      product.upcoming = key + count < to ? block(call_.values, group, start + key + count) : after;
      multiply_values(group, start + key, count, product);
      key += count;
    }
  };
  // What all rows see, in whole pairs, is weighed for all rows at once. The rest is weighed row by row, so that no
  // value, were it infinite, touches a row that does not see it.
  const int64_t seen = visible(group, first, split), shared = seen - seen % Plane::kPack;
  weigh(first, group.rows - first, 0, shared);
  for (int64_t row = first; row < group.rows; row++) weigh(row, 1, shared, visible(group, row, split));
}

template <class Plane>
void Attention<Plane>::multiply_keys(const Group& group, int64_t split, int64_t first, const Scratch& scratch) const {
  const int64_t seen = visible(group, group.rows - 1, split), start = split * kSplit;
  for (int64_t key = 0; key < seen; key += call_.block_size) {
    for (int64_t head = 0; head < group.heads; head++) {
      const int64_t row = head * group.rows + first;
      Product<Plane> product;
      product.vectors = block(call_.keys, group, start + key) + head * block_units_;
      product.column_stride = kLanes * call_.head_dim;
      product.step_stride = kLanes * Plane::kPack;
      product.scalars = scratch.queries + row * width_ / Plane::kPack;
      product.scalar_stride = width_ / Plane::kPack;
      product.out = scratch.scores + row * kScoreStride + key;
      product.out_stride = kScoreStride;
      product.rows = group.rows - first;
      product.columns = (std::min(call_.block_size, seen - key) + kLanes - 1) / kLanes;
      product.steps = call_.head_dim / Plane::kPack;
      product.fresh = true;
      const Unit* next = key + call_.block_size < seen ? block(call_.keys, group, start + key + call_.block_size)
                                                       : block(call_.values, group, start);
      product.upcoming = next + head * block_units_;
      multiply(product, false);
    }
  }
}

// Turns the scores of one row into unnormalized softmax weights, as the scalars of the product with the values, in
// place. Keys beyond `seen` get -inf before anything looks at them: whatever was stored there has no influence.
template <class Plane>
void Attention<Plane>::soften(float* scores, int64_t seen, float* state) const {
  const int64_t whole = seen / kLanes * kLanes;
  if (whole < seen) store(scores + whole, first_lanes(load(scores + whole), seen - whole, set1(-kInfinity)));
  Vec top = set1(-kInfinity);
  for (int64_t i = 0; i < seen; i += kLanes) top = larger(top, load(scores + i));
  const float peak = maximum(top) * scale_;
  const Vec scale = set1(scale_), below = set1(-peak);
  Vec total = zero();
  Scalar* weights = reinterpret_cast<Scalar*>(scores);
  for (int64_t i = 0; i < seen; i += kLanes) {
    const Vec weight = exp2(fma(load(scores + i), scale, below));
    total = total + weight;
    Plane::store_scalars(weights + i / Plane::kPack, weight);
  }
  state[width_] = peak;
  state[width_ + 1] = sum(total);
}

// Adds the weighted values of `count` tokens, all in one block, from an even token on, for all heads of the group.
template <class Plane>
void Attention<Plane>::multiply_values(const Group& group, int64_t token, int64_t count, Product<Plane> product) const {
  const bool half = call_.head_dim % kLanes != 0;
  product.vectors = block(call_.values, group, token) + token % call_.block_size * call_.head_dim;
  product.column_stride = kLanes * Plane::kPack;
  product.step_stride = call_.head_dim * Plane::kPack;
  product.scalar_stride = kScoreStride;
  product.out_stride = state_;
  product.columns = call_.head_dim / kLanes;
  product.steps = count / Plane::kPack;
  for (int64_t head = 0; head < group.heads; head++) {
    if (product.steps) multiply(product, half);
    if constexpr (Plane::kPack == 2) {
      if (count % 2) multiply(last_step(product), half);
    }
    product.vectors += block_units_;
    if (product.upcoming) product.upcoming += block_units_;
    product.scalars += group.rows * kScoreStride;
    product.out += group.rows * state_;
  }
}

template <class Plane>
void Attention<Plane>::merge(float* sum, const float* part) const {
  const float top = std::max(sum[width_], part[width_]);
  const Vec mine = exp2(set1(sum[width_] - top)), theirs = exp2(set1(part[width_] - top));
  for (int64_t i = 0; i < width_; i += kLanes) store(sum + i, fma(load(part + i), theirs, load(sum + i) * mine));
  store_first(sum + width_ + 1, fma(set1(part[width_ + 1]), theirs, set1(sum[width_ + 1]) * mine), 1);
  sum[width_] = top;
}

template <class Plane>
void Attention<Plane>::finish(const Group& group, const float* sum) const {
  each_row(group, call_.query_heads * call_.head_dim, [&](int64_t offset, int64_t row) {
    const float* state = sum + row * state_;
    with_type(call_.q_type, [&](auto kind) {
      auto* to = static_cast<decltype(kind)*>(call_.out) + offset;
      for (int64_t i = 0; i < width_; i += kLanes)
        store_first(to + i, load(state + i) / set1(state[width_ + 1]), call_.head_dim - i);
    });
  });
}

}  // namespace

void attend(const AttendCall& call) {
  switch (call.plane_type) {
    case Number::kFloat32: return Attention<Float32Plane>(call).run();
    case Number::kBFloat16: return Attention<BFloat16Plane>(call).run();
    case Number::kFloat16: return Attention<Float16Plane>(call).run();
  }
}

}  // namespace kvist
