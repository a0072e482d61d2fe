#include "attention.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "buffer.h"
#include "tiles.h"

namespace kvist {

Attention::Attention(const Batch& batch, const Keys& keys, const Values& values, const Result& result)
    : batch_(batch),
      keys_(keys),
      values_(values),
      result_(result),
      state_(batch.head_dim),
      plan_(make_plan(batch, at::get_num_threads())) {}

void Attention::run() const {
  const int64_t stride = state_.stride(), per_row = kScoreStride + 3 * stride;
  const Buffer<float> memory = make_buffer<float>(plan_.threads * plan_.largest * per_row);
  const Buffer<float> kept = make_buffer<float>(plan_.kept_rows * stride);
  const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[plan_.groups.size()]);
  for (size_t i = 0; i < plan_.groups.size(); i++) unfinished[i] = plan_.groups[i].splits;
  std::atomic<size_t> next{0};
  // Each thread takes half of its share of what is left: at first tasks whose memory adjoins, which is read faster,
  // at the end one at a time, since tasks differ in cost.
  at::parallel_for(0, plan_.threads, 1, [&](int64_t thread, int64_t) {
    const TileScope tiles;
    float* mine = memory.get() + thread * plan_.largest * per_row;
    const Scratch scratch{mine, mine + plan_.largest * stride, mine + plan_.largest * (stride + kScoreStride),
                          mine + plan_.largest * (2 * stride + kScoreStride)};
    const size_t count = plan_.tasks.size();
    for (size_t begin = next; begin < count; begin = next) {
      const size_t end = begin + std::max<size_t>(1, (count - begin) / (2 * plan_.threads));
      if (!next.compare_exchange_weak(begin, end)) continue;
      for (size_t i = begin; i < end; i++)
        work(plan_.tasks[i], scratch, kept.get(), unfinished[plan_.tasks[i].group]);
    }
  });
}

void Attention::work(Task task, const Scratch& scratch, float* kept, std::atomic<int64_t>& unfinished) const {
  const Group& group = plan_.groups[task.group];
  const int64_t rows = group.all_rows(), stride = state_.stride();
  const bool cut = task.split >= 0;
  const auto part = [&](int64_t split) { return cut ? kept + (group.kept + split * rows) * stride : scratch.part; };
  keys_.load_queries(group, scratch.queries);
  if (cut) {
    attend(split_of(group, task.split), scratch, part(task.split));
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  }
  std::fill_n(scratch.sum, rows * stride, 0.0f);
  for (int64_t row = 0; row < rows; row++) state_.maximum(scratch.sum + row * stride) = -kInfinity;
  for (int64_t index = 0; index < group.splits; index++) {
    if (!cut) attend(split_of(group, index), scratch, part(index));
    int64_t first = 0;
    while (batch_.seen(group, first) <= index * kSplit) first++;
    for (int64_t head = 0; head < group.heads; head++)
      for (int64_t row = head * group.rows + first; row < (head + 1) * group.rows; row++)
        merge(scratch.sum + row * stride, part(index) + row * stride);
  }
  result_.finish(group, scratch.sum);
}

Split Attention::split_of(const Group& group, int64_t index) const {
  const int64_t start = index * kSplit, size = batch_.block_size;
  Split split{group, start, group.rows, {}, 0, {}};
  for (int64_t row = group.rows - 1; row >= 0; row--) {
    split.visible[row] = std::min(batch_.seen(group, row) - start, kSplit);
    if (split.visible[row] > 0) split.first = row;
  }
  split.blocks = (split.seen() + size - 1) / size;
  for (int64_t i = 0; i < split.blocks; i++) {
    split.reads[i] = keys_.block(group, start + i * size);
    split.reads[split.blocks + i] = values_.block(group, start + i * size);
  }
  const int64_t end = 2 * split.blocks;
  split.reads[end] = index + 1 < group.splits ? keys_.block(group, start + kSplit) : split.reads[end - 1];
  return split;
}

// One split, for the rows that see any of it, into their states.
void Attention::attend(const Split& split, const Scratch& scratch, float* states) const {
  Fetcher fetcher(split);
  keys_.score(split, scratch.queries, scratch.scores, fetcher);
  for (int64_t head = 0; head < split.group.heads; head++) {
    for (int64_t row = split.first; row < split.group.rows; row++) {
      const int64_t index = head * split.group.rows + row;
      values_.soften(scratch.scores + index * kScoreStride, split.visible[row], states + index * state_.stride());
    }
  }
  values_.weigh(split, scratch.scores, states, fetcher);
}

void Attention::merge(float* sum, const float* part) const {
  const float top = std::max(state_.maximum(sum), state_.maximum(part));
  const Vec mine = exp2(set1(state_.maximum(sum) - top)), theirs = exp2(set1(state_.maximum(part) - top));
  for (int64_t i = 0; i < state_.width; i += kLanes)
    store(sum + i, fma(load(part + i), theirs, load(sum + i) * mine));
  store_first(sum + state_.width + 1, fma(set1(state_.sum(part)), theirs, set1(state_.sum(sum)) * mine), 1);
  state_.maximum(sum) = top;
}

}  // namespace kvist
