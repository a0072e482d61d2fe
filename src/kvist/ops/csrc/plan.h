// How the work of one attention call is cut. Nothing here changes a bit of the result.
//
// The rows of one KV head share each key and value that is read, so they stay together, up to 48. When they are few
// (decode), a group takes several KV heads, which lie side by side in a block: memory is then read in long runs. But no
// more than the second-level cache holds of a split's keys and values at once. A group is one task, or, when that would
// leave threads idle, one task per split of 512 keys.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.h"

namespace kvist {

struct Task {
  int64_t group, split;  // split -1: all of them, in order
};

struct Plan {
  std::vector<Group> groups;
  std::vector<Task> tasks;
  int64_t threads = 1;
  int64_t largest = 0;    // rows of the largest group
  int64_t kept_rows = 0;  // rows of all partial results
};

// `head_bytes`: of one head in one block, of its keys or its values, whichever are more.
Plan make_plan(const Batch& batch, int64_t head_bytes, int64_t most_threads);

}  // namespace kvist
