#include "results.h"

#include <algorithm>
#include <cmath>

namespace kvist {

void Normalized::finish(const Group& group, const float* states) const {
  batch_.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
    const float* state = states + row * state_.stride();
    const int64_t index = token * batch_.query_heads + head;
    with_type(output_.type, [&](auto kind) {
      auto* to = static_cast<decltype(kind)*>(output_.out) + index * batch_.head_dim;
      for (int64_t i = 0; i < state_.width; i += kLanes)
        store_first(to + i, load(state + i) / set1(state_.sum(state)), batch_.head_dim - i);
    });
    if (output_.lse) output_.lse[index] = log_sum(state_, state);
  });
}

void Merged::finish(const Group& group, const float* states) const {
  alignas(64) float sealed[kLanes][kMaxHeadDim];
  batch_.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
    const int64_t lane = row % kLanes, index = token * batch_.query_heads + head;
    if (lane == 0) leave_frame(group, row, std::min<int64_t>(kLanes, group.all_rows() - row), states, sealed);
    const bool any = batch_.seen(group, row % group.rows) > 0;
    const float lost = any && keys_ ? keys_->lost(group, row) : 0.0f;
    const float sum = any ? log_sum(state_, states + row * state_.stride()) + lost : -kInfinity;
    merge(index, sealed[lane], sum);
  });
}

// Rows [row, row + count), one to a lane.
void Merged::leave_frame(const Group& group, int64_t row, int64_t count, const float* states,
                         float (*sealed)[kMaxHeadDim]) const {
  const int64_t dims = batch_.head_dim;
  for (int64_t lane = 0; lane < count; lane++) {
    const float* state = states + (row + lane) * state_.stride();
    for (int64_t i = 0; i < dims; i += kLanes) store(sealed[lane] + i, load(state + i) / set1(state_.sum(state)));
  }
  if (!values_) return;
  alignas(64) Lanes x[kMaxCodedDim];
  if (count < kLanes) std::fill_n(x[0], dims * kLanes, 0.0f);
  for (int64_t lane = 0; lane < count; lane++)
    for (int64_t i = 0; i < dims; i++) x[i][lane] = sealed[lane][i];
  rotate_back(x, values_->coding, values_->frame);
  for (int64_t lane = 0; lane < count; lane++) {
    const int32_t* order = values_->frame.order + (group.head + (row + lane) / group.rows) * dims;
    for (int64_t i = 0; i < dims; i++) sealed[lane][order[i]] = x[i][lane];
  }
}

// Each by its share in the sum of both. A row that sees nothing but its own block gets exactly that.
void Merged::merge(int64_t index, const float* sealed, float sealed_sum) const {
  const int64_t dims = batch_.head_dim;
  const float* own = own_.out + index * dims;
  const float own_sum = own_.lse[index];
  const bool alone = sealed_sum == -kInfinity;
  const float top = std::max(own_sum, sealed_sum);
  const Vec mine = exp2(set1(own_sum - top)), theirs = exp2(set1(sealed_sum - top)), both = mine + theirs;
  with_type(output_.type, [&](auto kind) {
    auto* to = static_cast<decltype(kind)*>(output_.out) + index * dims;
    for (int64_t i = 0; i < dims; i += kLanes) {
      const Vec before = load_first(own + i, dims - i);
      const Vec mixed = fma(load(sealed + i), theirs, before * mine) / both;
      store_first(to + i, alone ? before : mixed, dims - i);
    }
  });
  if (output_.lse) output_.lse[index] = alone ? own_sum : top + std::log2(sum(first_lanes(both, 1, zero())));
}

}  // namespace kvist
