#include "attention.h"

#include <algorithm>

#include "buffer.h"
#include "parallel.h"
#include "shares.h"
#include "tiles.h"

namespace kvist {

Attention::Attention(const Batch& batch, const Keys& keys, const Values& values, const Result& result)
    : batch_(batch),
      keys_(keys),
      values_(values),
      result_(result),
      state_(batch.head_dim),
      plan_(make_plan(batch, std::max(keys.head_bytes(), values.head_bytes()), thread_count())) {}

void Attention::run() const {
  const int64_t stride = state_.stride(), query_stride = State(batch_.key_dim).stride();
  const int64_t per_row = query_stride + kScoreStride + 2 * stride;
  const Buffer<float> memory = make_buffer<float>(plan_.threads * plan_.largest * per_row);
  const Buffer<float> kept = make_buffer<float>(plan_.kept_rows * stride);
  const std::unique_ptr<std::atomic<int64_t>[]> unfinished(new std::atomic<int64_t>[plan_.groups.size()]);
  for (size_t i = 0; i < plan_.groups.size(); i++) unfinished[i] = plan_.groups[i].splits - plan_.groups[i].first_split;
  const std::vector<Task>& tasks = plan_.tasks;
  const int64_t count = static_cast<int64_t>(tasks.size());
  Shares shares(count, plan_.threads);
  parallel_for(plan_.threads, 1, [&](int64_t thread, int64_t) {  // whoever comes late finds nothing left
    const TileScope tiles;
    float* mine = memory.get() + thread * plan_.largest * per_row;
    const Scratch scratch{mine, mine + plan_.largest * query_stride,
                          mine + plan_.largest * (query_stride + kScoreStride),
                          mine + plan_.largest * (query_stride + kScoreStride + stride)};
    for (int64_t i = shares.take(thread); i >= 0; i = shares.take(thread))
      work(tasks[i], i + 1 < count ? &tasks[i + 1] : nullptr, scratch, kept.get(), unfinished[tasks[i].group]);
  });
}

void Attention::work(Task task, const Task* next, const Scratch& scratch, float* kept,
                     std::atomic<int64_t>& unfinished) const {
  const Group& group = plan_.groups[task.group];
  const int64_t rows = group.all_rows(), stride = state_.stride();
  const bool cut = task.split >= 0;
  const auto part = [&](int64_t split) {
    return cut ? kept + (group.kept + (split - group.first_split) * rows) * stride : scratch.part;
  };
  keys_.load_queries(group, scratch.queries);
  if (cut) {
    attend(task, next, scratch, part(task.split));
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  }
  std::fill_n(scratch.sum, rows * stride, 0.0f);
  for (int64_t row = 0; row < rows; row++) state_.maximum(scratch.sum + row * stride) = -kInfinity;
  for (int64_t index = group.first_split; index < group.splits; index++) {
    const Task following{task.group, index + 1};
    if (!cut) attend({task.group, index}, index + 1 < group.splits ? &following : next, scratch, part(index));
    const Split split = split_of({task.group, index});
    for (int64_t head = 0; head < group.heads; head++)
      for (int64_t row = split.first; row < split.last; row++) {
        const int64_t place = (head * group.rows + row) * stride;
        if (split.sees(row)) merge(scratch.sum + place, part(index) + place);
      }
  }
  result_.finish(group, scratch.sum);
}

// One split, for the rows that see any of it, into their states. While its keys are worked on its values are fetched,
// and while those are worked on the keys of what comes next.
void Attention::attend(Task task, const Task* next, const Scratch& scratch, float* states) const {
  const Split split = split_of(task);
  if (!split.rows()) return;  // a window that ends within the query's own block
  const Reads values = reads_of(values_, task);
  Fetcher fetch_values(values);
  const float share = (1 - kFetchedInProduct) / static_cast<float>(split.group.heads * split.rows());
  for (int64_t head = 0; head < split.group.heads; head++) {
    keys_.score(split, head, scratch.queries, scratch.scores, fetch_values);
    for (int64_t row = split.first; row < split.last; row++) {
      const int64_t index = head * split.group.rows + row, seen = split.visible[row];
      if (!split.sees(row)) {
        std::fill_n(scratch.scores + index * kScoreStride, std::max<int64_t>(seen, 0), 0.0f);
        continue;
      }
      fetch_values.pace(share, (seen + kLanes - 1) / kLanes);
      values_.soften(scratch.scores + index * kScoreStride, split.hidden[row], seen, states + index * state_.stride(),
                     fetch_values);
    }
  }
  const Reads next_keys = next ? reads_of(keys_, *next) : Reads{};
  Fetcher fetch_keys(next_keys);
  values_.weigh(split, scratch.scores, states, fetch_keys);
}

Split Attention::split_of(Task task) const {
  const Group& group = plan_.groups[task.group];
  Split split{group, task.split * kSplit, group.rows, 0, 0, {}, {}};
  for (int64_t row = group.rows - 1; row >= 0; row--) {
    split.visible[row] = std::min(batch_.seen(group, row) - split.start, kSplit);
    split.hidden[row] = std::max<int64_t>(batch_.oldest(group, row) - split.start, 0);
    if (split.visible[row] > split.hidden[row]) {
      split.first = row;
      split.last = std::max(split.last, row + 1);
    }
  }
  split.first = std::min(split.first, split.last);
  if (split.rows()) split.begin = split.hidden[split.first] / batch_.block_size * batch_.block_size;
  return split;
}

// What a side reads in a split, or in the first one of a task that is all splits.
template <class Side>
Reads Attention::reads_of(const Side& side, Task task) const {
  const Group& group = plan_.groups[task.group];
  const int64_t start = std::max(task.split, group.first_split) * kSplit;
  const int64_t end = std::min(batch_.seen(group, group.rows - 1), start + kSplit);
  const int64_t begin = std::max(start, batch_.oldest(group, 0) / batch_.block_size * batch_.block_size);
  Reads reads;
  for (int64_t token = begin; token < end; token += batch_.block_size) side.add_reads(group, token, reads);
  return reads;
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
