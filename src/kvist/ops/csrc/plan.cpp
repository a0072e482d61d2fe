#include "plan.h"

#include <algorithm>

namespace kvist {
namespace {

constexpr int64_t kTasksPerThread = 8;        // enough that the last of them to finish is not waited for long
constexpr int64_t kFetchedBytes = 320 << 10;  // of one side of a split, while the other is read
constexpr int64_t kWorkPerThread = 200'000;   // multiply-adds that pay for waking one more thread

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups of one sequence, of at most `heads_limit` heads.
void add_groups(const Batch& batch, int64_t sequence, int64_t heads_limit, std::vector<Group>& groups) {
  const int64_t rows = batch.queries(sequence) * batch.heads_per_kv();
  const int64_t most = std::clamp<int64_t>(rows ? kGroupRows / rows : 1, 1, heads_limit);
  const int64_t together = ceil_divide(batch.heads, ceil_divide(batch.heads, most));
  for (int64_t first = 0; first < rows; first += kGroupRows) {
    const int64_t count = std::min(kGroupRows, rows - first);
    for (int64_t head = 0; head < batch.heads; head += together) {
      Group group{sequence, head, std::min(together, batch.heads - head), first, count, 0, 0};
      group.splits = ceil_divide(batch.seen(group, count - 1), kSplit);
      group.first_split = std::min(batch.oldest(group, 0) / kSplit, group.splits);
      groups.push_back(group);
    }
  }
}

int64_t splits_of(const Group& group) { return group.splits - group.first_split; }
int64_t cost(const Group& group) { return group.all_rows() * splits_of(group); }

}  // namespace

Plan make_plan(const Batch& batch, int64_t head_bytes, int64_t most_threads) {
  Plan plan;
  int64_t work = 0, pieces = 0, total = 0;
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int64_t rows = batch.queries(s) * batch.heads_per_kv();
    const int64_t length = batch.lengths[s], tokens = batch.window ? std::min(length, batch.window) : length;
    work += 2 * rows * batch.heads * tokens * batch.head_dim;
    pieces += ceil_divide(rows, kGroupRows) * ceil_divide(tokens, kSplit);
  }
  plan.threads = std::min(most_threads, 1 + work / kWorkPerThread);
  const int64_t wanted = plan.threads == 1 ? 1 : plan.threads * kTasksPerThread;
  const int64_t most_heads = std::min(batch.heads / ceil_divide(wanted, std::max<int64_t>(1, pieces)),
                                      kFetchedBytes / (head_bytes * kSplit / batch.block_size));
  const int64_t heads_limit = std::max<int64_t>(1, most_heads);
  for (int64_t s = 0; s < batch.sequences; s++) add_groups(batch, s, heads_limit, plan.groups);
  // The costly ones first: what is left at the end is small.
  std::stable_sort(plan.groups.begin(), plan.groups.end(),
                   [](const Group& a, const Group& b) { return cost(a) > cost(b); });
  for (const Group& group : plan.groups) {
    total += cost(group);
    plan.largest = std::max(plan.largest, group.all_rows());
  }
  for (size_t i = 0; i < plan.groups.size(); i++) {
    Group& group = plan.groups[i];
    const int64_t index = static_cast<int64_t>(i);
    if (plan.threads == 1 || splits_of(group) <= 1 || cost(group) * wanted <= total) {
      plan.tasks.push_back({index, -1});
      continue;
    }
    group.kept = plan.kept_rows;
    plan.kept_rows += cost(group);
    for (int64_t split = group.first_split; split < group.splits; split++) plan.tasks.push_back({index, split});
  }
  return plan;
}

}  // namespace kvist
