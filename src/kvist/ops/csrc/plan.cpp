#include "plan.h"

#include <algorithm>

namespace kvist {
namespace {

constexpr int64_t kGroupRows = 48;
constexpr int64_t kTasksPerThread = 8;       // enough that the last of them to finish is not waited for long
constexpr int64_t kWorkPerThread = 200'000;  // multiply-adds that pay for waking one more thread

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Groups of one sequence, of at most `heads_limit` heads.
void add_groups(const AttendCall& call, int64_t sequence, int64_t heads_limit, std::vector<Group>& groups) {
  const int64_t heads_per_kv = call.query_heads / call.heads, queries = call.queries(sequence);
  const int64_t rows = queries * heads_per_kv, before = call.lengths[sequence] - queries;
  const int64_t together = std::clamp<int64_t>(rows ? kGroupRows / rows : 1, 1, heads_limit);
  for (int64_t first = 0; first < rows; first += kGroupRows) {
    const int64_t count = std::min(kGroupRows, rows - first);
    const int64_t splits = (before + (first + count - 1) / heads_per_kv) / kSplit + 1;
    for (int64_t head = 0; head < call.heads; head += together)
      groups.push_back({sequence, head, std::min(together, call.heads - head), first, count, splits});
  }
}

int64_t cost(const Group& group) { return group.all_rows() * group.splits; }

}  // namespace

Plan make_plan(const AttendCall& call, int64_t most_threads) {
  Plan plan;
  int64_t work = 0, pieces = 0, total = 0;
  for (int64_t s = 0; s < call.sequences; s++) {
    const int64_t rows = call.queries(s) * call.query_heads / call.heads;
    work += 2 * rows * call.heads * call.lengths[s] * call.head_dim;
    pieces += ceil_divide(rows, kGroupRows) * ceil_divide(call.lengths[s], kSplit);
  }
  plan.threads = std::min(most_threads, 1 + work / kWorkPerThread);
  const int64_t wanted = plan.threads == 1 ? 1 : plan.threads * kTasksPerThread;
  const int64_t heads_limit = std::max<int64_t>(1, call.heads / ceil_divide(wanted, std::max<int64_t>(1, pieces)));
  for (int64_t s = 0; s < call.sequences; s++) add_groups(call, s, heads_limit, plan.groups);
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
    if (plan.threads == 1 || group.splits == 1 || cost(group) * wanted <= total) {
      plan.tasks.push_back({index, -1});
      continue;
    }
    group.kept = plan.kept_rows;
    plan.kept_rows += cost(group);
    for (int64_t split = 0; split < group.splits; split++) plan.tasks.push_back({index, split});
  }
  return plan;
}

}  // namespace kvist
