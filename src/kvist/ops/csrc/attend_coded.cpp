#include "attend_coded.h"

#include "coded.h"
#include "dense.h"

namespace kvist {
namespace {

// Divides by the sums, leaves the values' frame, and adds each row's own block. `keys`: null where they are not coded.
class Merged : public Result {
 public:
  Merged(const AttendCodedCall& call, const CodedKeys* keys) : call_(call), keys_(keys), state_(call.batch.head_dim) {}

  void finish(const Group& group, const float* states) const override {
    const Batch& batch = call_.batch;
    alignas(64) float sealed[kLanes][kMaxCodedDim];
    batch.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
      const int64_t lane = row % kLanes, index = token * batch.query_heads + head;
      if (lane == 0) leave_frame(group, row, std::min<int64_t>(kLanes, group.all_rows() - row), states, sealed);
      const bool any = batch.seen(group, row % group.rows) > 0;
      const float lost = any && keys_ ? keys_->lost(group, row) : 0.0f;
      const float sum = any ? log_sum(state_, states + row * state_.stride()) + lost : -kInfinity;
      merge(index, sealed[lane], sum);
    });
  }

 private:
  // Rows [row, row + count), one to a lane.
  void leave_frame(const Group& group, int64_t row, int64_t count, const float* states,
                   float (*sealed)[kMaxCodedDim]) const {
    const int64_t dims = call_.batch.head_dim;
    for (int64_t lane = 0; lane < count; lane++) {
      const float* state = states + (row + lane) * state_.stride();
      for (int64_t i = 0; i < dims; i += kLanes) store(sealed[lane] + i, load(state + i) / set1(state_.sum(state)));
    }
    if (!call_.values.coded) return;
    const CodedStream& stream = *call_.values.coded;
    alignas(64) Lanes x[kMaxCodedDim];
    if (count < kLanes) std::fill_n(x[0], dims * kLanes, 0.0f);
    for (int64_t lane = 0; lane < count; lane++)
      for (int64_t i = 0; i < dims; i++) x[i][lane] = sealed[lane][i];
    rotate_back(x, stream.coding, stream.frame);
    for (int64_t lane = 0; lane < count; lane++) {
      const int32_t* order = stream.frame.order + (group.head + (row + lane) / group.rows) * dims;
      for (int64_t i = 0; i < dims; i++) sealed[lane][order[i]] = x[i][lane];
    }
  }

  // Each by its share in the sum of both. A row that sees nothing but its own block gets exactly that.
  void merge(int64_t index, const float* sealed, float sealed_sum) const {
    const int64_t dims = call_.batch.head_dim;
    const float* own = call_.own + index * dims;
    const float own_sum = call_.lse[index];
    const bool alone = sealed_sum == -kInfinity;
    const float top = std::max(own_sum, sealed_sum);
    const Vec mine = exp2(set1(own_sum - top)), theirs = exp2(set1(sealed_sum - top)), both = mine + theirs;
    with_type(call_.batch.q_type, [&](auto kind) {
      auto* to = static_cast<decltype(kind)*>(call_.out) + index * dims;
      for (int64_t i = 0; i < dims; i += kLanes) {
        const Vec mixed = fma(load(sealed + i), theirs, load(own + i) * mine) / both;
        store(to + i, alone ? load(own + i) : mixed);
      }
    });
  }

  const AttendCodedCall& call_;
  const CodedKeys* keys_;
  const State state_;
};

}  // namespace

void attend_coded(const AttendCodedCall& call) {
  const Batch& batch = call.batch;
  const auto coded = call.keys.coded ? std::make_unique<CodedKeys>(batch, *call.keys.coded) : nullptr;
  const auto dense = coded ? nullptr : dense_keys(batch, call.keys.plane, call.keys.type);
  const auto values = call.values.coded ? std::unique_ptr<Values>(new CodedValues(batch, *call.values.coded))
                                        : dense_values(batch, call.values.plane, call.values.type);
  const Keys& keys = coded ? static_cast<const Keys&>(*coded) : *dense;
  Attention(batch, keys, *values, Merged(call, coded.get())).run();
}

}  // namespace kvist
