// Attention in splits of 512 keys at absolute positions. attend.h says what it computes, product.h how a row's sums
// are ordered.
//
// Work is cut into row groups: up to 48 (query, head) rows that share one KV head, so that each key and value is read
// once for all of them. A group is either one task, which walks its splits in order, or one task per split, whose
// partial results the last of them to finish merges in that same order. Both give the same bits: per split one maximum,
// one sum and one unnormalized output; merged first to last (online softmax, arXiv 1805.02867).
#include "attend.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "product.h"

namespace kvist {
namespace {

constexpr int64_t kGroupRows = 48;
constexpr int64_t kScoreStride = kSplit + kLanes;  // off the power of two, where rows would share their cache sets
constexpr int64_t kTasksPerThread = 8;             // a group that is more than this share of the work is cut
constexpr int64_t kWorkPerThread = 200'000;        // multiply-adds that pay for waking one more thread

struct Group {
  int64_t sequence, head;
  int64_t first_row, rows;  // a sequence's rows are token-major: row = token * heads per KV head + head in the group
  int64_t splits;
  int64_t partials = -1;  // where the partial results of its splits begin, when they are tasks of their own
};

struct Task {
  int64_t group, split;  // split -1: all of them, in order
};

// What rows know after some of their keys. `weighted` has the head dim rounded up to whole vectors.
struct Partial {
  float* weighted;  // [rows, width]
  float* maximum;   // [rows], of score * log2(e)
  float* total;     // [rows]
};

struct Deleter {
  void operator()(float* buffer) const { ::operator delete[](buffer, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], Deleter>;

Buffer make_buffer(int64_t count) {
  return Buffer(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t{64})));
}

template <class T>
void read_numbers(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load_first(from + i, std::min<int64_t>(kLanes, count - i)));
}

template <class T>
void write_numbers(T* to, int64_t count, const float* from) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_first(to + i, load(from + i), std::min<int64_t>(kLanes, count - i));
}

template <class Plane>
class Attention {
  using Unit = typename Plane::Unit;
  using Scalar = typename Plane::Scalar;

 public:
  explicit Attention(const AttendCall& call)
      : call_(call),
        group_heads_(call.query_heads / call.heads),
        width_((call.head_dim + kLanes - 1) / kLanes * kLanes),
        block_units_(call.block_size * call.head_dim),
        scale_(static_cast<float>(call.scale * 1.4426950408889634)) {}

  void run() {
    plan();
    const Buffer scratch = make_buffer(threads_ * scratch_size());
    const Buffer partials = make_buffer(partials_size_);
    const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[groups_.size()]);
    for (size_t i = 0; i < groups_.size(); i++) unfinished[i] = groups_[i].splits;
    std::atomic<size_t> next{0};
    // Tasks differ in cost, so each thread takes the next one when it is done.
    at::parallel_for(0, threads_, 1, [&](int64_t thread, int64_t) {
      float* mine = scratch.get() + thread * scratch_size();
      for (size_t i = next++; i < tasks_.size(); i = next++) {
        const Task task = tasks_[i];
        work(task, mine, partials.get(), unfinished[task.group]);
      }
    });
  }

 private:
  void plan();
  void work(Task task, float* scratch, float* partials, std::atomic<int64_t>& unfinished) const;
  void load_queries(const Group& group, Scalar* queries) const;
  void attend_split(const Group& group, int64_t split, const Scalar* queries, float* scores, Partial out) const;
  void multiply_keys(const Group& group, int64_t split, int64_t first, const Scalar* queries, float* scores) const;
  void soften(float* scores, int64_t seen, float* maximum, float* total) const;
  void multiply_values(const Group& group, int64_t start, int64_t from, int64_t to, const float* scores, float* out,
                       int64_t rows) const;
  void merge(Partial sum, Partial part, int64_t row) const;
  void finish(const Group& group, Partial sum) const;

  int64_t queries(int64_t sequence) const { return call_.starts[sequence + 1] - call_.starts[sequence]; }

  // How many keys of the split the row sees: at most 512, 0 or less when the row ends before.
  int64_t visible(const Group& group, int64_t row, int64_t split) const {
    const int64_t token = (group.first_row + row) / group_heads_;
    const int64_t position = call_.lengths[group.sequence] - queries(group.sequence) + token;
    return std::min(position + 1 - split * kSplit, kSplit);
  }

  int64_t first_visible(const Group& group, int64_t split) const {
    int64_t row = 0;
    while (visible(group, row, split) <= 0) row++;
    return row;
  }

  const Unit* block(const void* plane, const Group& group, int64_t token) const {
    const int64_t id = call_.tables[group.sequence * call_.table_stride + token / call_.block_size];
    return static_cast<const Unit*>(plane) + (id * call_.heads + group.head) * block_units_;
  }

  // Where a row of q or of the output begins, in numbers.
  int64_t row_offset(const Group& group, int64_t row, int64_t token_stride) const {
    const int64_t token = (group.first_row + row) / group_heads_, head = (group.first_row + row) % group_heads_;
    return (call_.starts[group.sequence] + token) * token_stride +
           (group.head * group_heads_ + head) * call_.head_dim;
  }

  int64_t partial_size(int64_t rows) const { return (rows * (width_ + 2) + kLanes - 1) / kLanes * kLanes; }
  int64_t scratch_size() const { return max_rows_ * (width_ + kScoreStride) + 2 * partial_size(max_rows_); }
  Partial partial(float* at, int64_t rows) const { return {at, at + rows * width_, at + rows * (width_ + 1)}; }

  const AttendCall& call_;
  const int64_t group_heads_, width_, block_units_;
  const float scale_;  // times log2(e): maxima and exponents are binary
  std::vector<Group> groups_;
  std::vector<Task> tasks_;
  int64_t max_rows_ = 0, partials_size_ = 0, threads_ = 0;
};

template <class Plane>
void Attention<Plane>::plan() {
  int64_t work = 0, cost = 0;
  for (int64_t sequence = 0; sequence < call_.sequences; sequence++) {
    const int64_t rows = queries(sequence) * group_heads_, length = call_.lengths[sequence];
    work += rows * call_.heads * length * call_.head_dim * 2;
    for (int64_t first = 0; first < rows; first += kGroupRows) {
      const int64_t count = std::min(kGroupRows, rows - first);
      const int64_t last = length - queries(sequence) + (first + count - 1) / group_heads_;
      const int64_t splits = last / kSplit + 1;
      max_rows_ = std::max(max_rows_, count);
      cost += call_.heads * splits * count;
      for (int64_t head = 0; head < call_.heads; head++) groups_.push_back({sequence, head, first, count, splits});
    }
  }
  threads_ = std::min<int64_t>(at::get_num_threads(), 1 + work / kWorkPerThread);
  // The costly ones first: what is left at the end is small.
  std::stable_sort(groups_.begin(), groups_.end(),
                   [](const Group& a, const Group& b) { return a.splits * a.rows > b.splits * b.rows; });
  for (size_t i = 0; i < groups_.size(); i++) {
    Group& group = groups_[i];
    if (threads_ > 1 && group.splits * group.rows * threads_ * kTasksPerThread > cost) {
      group.partials = partials_size_;
      partials_size_ += group.splits * partial_size(group.rows);
      for (int64_t split = 0; split < group.splits; split++) tasks_.push_back({static_cast<int64_t>(i), split});
    } else {
      tasks_.push_back({static_cast<int64_t>(i), -1});
    }
  }
}

template <class Plane>
void Attention<Plane>::work(Task task, float* scratch, float* partials, std::atomic<int64_t>& unfinished) const {
  const Group& group = groups_[task.group];
  Scalar* queries = reinterpret_cast<Scalar*>(scratch);
  float* scores = scratch + max_rows_ * width_;
  const Partial sum = partial(scores + max_rows_ * kScoreStride, group.rows);
  const Partial part = partial(scores + max_rows_ * kScoreStride + partial_size(max_rows_), group.rows);
  const bool cut = task.split >= 0;
  const auto kept = [&](int64_t split) {
    return partial(partials + group.partials + split * partial_size(group.rows), group.rows);
  };
  load_queries(group, queries);
  if (cut) {
    attend_split(group, task.split, queries, scores, kept(task.split));
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  }
  std::fill_n(sum.weighted, group.rows * width_, 0.0f);
  std::fill_n(sum.maximum, group.rows, -std::numeric_limits<float>::infinity());
  std::fill_n(sum.total, group.rows, 0.0f);
  for (int64_t split = 0; split < group.splits; split++) {
    if (!cut) attend_split(group, split, queries, scores, part);
    for (int64_t row = first_visible(group, split); row < group.rows; row++) merge(sum, cut ? kept(split) : part, row);
  }
  finish(group, sum);
}

template <class Plane>
void Attention<Plane>::load_queries(const Group& group, Scalar* queries) const {
  alignas(64) float numbers[kMaxHeadDim];
  for (int64_t row = 0; row < group.rows; row++) {
    const int64_t offset = row_offset(group, row, call_.q_stride);
    with_type(call_.q_type, [&](auto kind) {
      read_numbers(static_cast<const decltype(kind)*>(call_.q) + offset, call_.head_dim, numbers);
    });
    for (int64_t i = 0; i < width_; i += kLanes)
      Plane::store_scalars(queries + (row * width_ + i) / Plane::kPack, load(numbers + i));
  }
}

// One split for the rows from the first that sees any of it.
template <class Plane>
void Attention<Plane>::attend_split(const Group& group, int64_t split, const Scalar* queries, float* scores,
                                    Partial out) const {
  const int64_t first = first_visible(group, split), start = split * kSplit;
  multiply_keys(group, split, first, queries, scores);
  for (int64_t row = first; row < group.rows; row++)
    soften(scores + row * kScoreStride, visible(group, row, split), out.maximum + row, out.total + row);
  // Up to the last whole pair that all rows see, values are multiplied with all rows at once; what only later rows see
  // is multiplied row by row, so that no value, were it infinite, touches a row that does not see it.
  const int64_t seen = visible(group, first, split), shared = seen - seen % Plane::kPack;
  multiply_values(group, start, 0, shared, scores + first * kScoreStride, out.weighted + first * width_,
                  group.rows - first);
  for (int64_t row = first; row < group.rows; row++)
    multiply_values(group, start, shared, visible(group, row, split), scores + row * kScoreStride,
                    out.weighted + row * width_, 1);
}

template <class Plane>
void Attention<Plane>::multiply_keys(const Group& group, int64_t split, int64_t first, const Scalar* queries,
                                     float* scores) const {
  const int64_t seen = visible(group, group.rows - 1, split), dims = call_.head_dim;
  for (int64_t key = 0; key < seen; key += call_.block_size) {
    Product<Plane> product;
    product.vectors = block(call_.keys, group, split * kSplit + key);
    product.column_stride = kLanes * dims;
    product.step_stride = kLanes * Plane::kPack;
    product.scalars = queries + first * width_ / Plane::kPack;
    product.scalar_stride = width_ / Plane::kPack;
    product.out = scores + first * kScoreStride + key;
    product.out_stride = kScoreStride;
    product.rows = group.rows - first;
    product.columns = (std::min(call_.block_size, seen - key) + kLanes - 1) / kLanes;
    product.steps = dims / Plane::kPack;
    product.fresh = true;
    product.upcoming = key + call_.block_size < seen ? block(call_.keys, group, split * kSplit + key + call_.block_size)
                                                     : block(call_.values, group, split * kSplit);
    multiply(product, false);
  }
}

// Turns the scores of one row into unnormalized softmax weights, as the scalars of the product with the values, in
// place. Keys beyond `seen` get -inf before anything looks at them: whatever was stored there has no influence.
template <class Plane>
void Attention<Plane>::soften(float* scores, int64_t seen, float* maximum_out, float* total_out) const {
  const Vec nothing = set1(-std::numeric_limits<float>::infinity()), scale = set1(scale_);
  const int64_t whole = seen / kLanes * kLanes;
  if (whole < seen) store(scores + whole, first_lanes(load(scores + whole), seen - whole, nothing));
  Vec top = nothing;
  for (int64_t i = 0; i < seen; i += kLanes) top = larger(top, load(scores + i));
  const float peak = maximum(top) * scale_;
  const Vec below = set1(-peak);
  Vec total = zero();
  Scalar* weights = reinterpret_cast<Scalar*>(scores);
  for (int64_t i = 0; i < seen; i += kLanes) {
    const Vec weight = exp2(fma(load(scores + i), scale, below));
    total = total + weight;
    Plane::store_scalars(weights + i / Plane::kPack, weight);
  }
  *maximum_out = peak;
  *total_out = sum(total);
}

// Adds the weighted values of keys [from, to) of the split that begins at token `start`; `from` is even.
template <class Plane>
void Attention<Plane>::multiply_values(const Group& group, int64_t start, int64_t from, int64_t to,
                                       const float* scores, float* out, int64_t rows) const {
  const int64_t dims = call_.head_dim;
  for (int64_t key = from; key < to;) {
    const int64_t within = (start + key) % call_.block_size, count = std::min(to - key, call_.block_size - within);
    Product<Plane> product;
    product.vectors = block(call_.values, group, start + key) + within * dims;
    product.column_stride = kLanes * Plane::kPack;
    product.step_stride = dims * Plane::kPack;
    product.scalars = reinterpret_cast<const Scalar*>(scores) + key / Plane::kPack;
    product.scalar_stride = kScoreStride;
    product.out = out;
    product.out_stride = width_;
    product.rows = rows;
    product.columns = dims / kLanes;
    product.steps = count / Plane::kPack;
    product.fresh = key == 0;
    product.upcoming = key + count < to ? block(call_.values, group, start + key + count)
                       : start + kSplit < call_.lengths[group.sequence] ? block(call_.keys, group, start + kSplit) : product.vectors;
    const bool half = dims % kLanes != 0;
    if (product.steps) multiply(product, half);
    if constexpr (Plane::kPack == 2) {
      if (count % 2) multiply(last_step(product), half);
    }
    key += count;
  }
}

template <class Plane>
void Attention<Plane>::merge(Partial sum, Partial part, int64_t row) const {
  const float top = std::max(sum.maximum[row], part.maximum[row]);
  const Vec mine = exp2(set1(sum.maximum[row] - top)), theirs = exp2(set1(part.maximum[row] - top));
  float* into = sum.weighted + row * width_;
  const float* from = part.weighted + row * width_;
  for (int64_t i = 0; i < width_; i += kLanes) store(into + i, fma(load(from + i), theirs, load(into + i) * mine));
  const Vec total = fma(set1(part.total[row]), theirs, set1(sum.total[row]) * mine);
  store_first(sum.total + row, total, 1);
  sum.maximum[row] = top;
}

template <class Plane>
void Attention<Plane>::finish(const Group& group, Partial sum) const {
  alignas(64) float numbers[kMaxHeadDim];
  for (int64_t row = 0; row < group.rows; row++) {
    for (int64_t i = 0; i < width_; i += kLanes)
      store(numbers + i, load(sum.weighted + row * width_ + i) / set1(sum.total[row]));
    const int64_t offset = row_offset(group, row, call_.query_heads * call_.head_dim);
    with_type(call_.q_type, [&](auto kind) {
      write_numbers(static_cast<decltype(kind)*>(call_.out) + offset, call_.head_dim, numbers);
    });
  }
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
