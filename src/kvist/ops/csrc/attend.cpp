#include "attend.h"

#include <cmath>

#include "attention.h"
#include "dense.h"

namespace kvist {
namespace {

class Normalized : public Result {
 public:
  explicit Normalized(const AttendCall& call) : call_(call), state_(call.batch.head_dim) {}

  void finish(const Group& group, const float* states) const override {
    const Batch& batch = call_.batch;
    const Number type = call_.lse ? Number::kFloat32 : batch.q_type;
    batch.each_row(group, [&](int64_t token, int64_t head, int64_t row) {
      const float* state = states + row * state_.stride();
      const int64_t index = token * batch.query_heads + head;
      with_type(type, [&](auto kind) {
        auto* to = static_cast<decltype(kind)*>(call_.out) + index * batch.head_dim;
        for (int64_t i = 0; i < state_.width; i += kLanes)
          store_first(to + i, load(state + i) / set1(state_.sum(state)), batch.head_dim - i);
      });
      if (call_.lse) call_.lse[index] = log_sum(state_, state);
    });
  }

 private:
  const AttendCall& call_;
  const State state_;
};

}  // namespace

void attend(const AttendCall& call) {
  const auto keys = dense_keys(call.batch, call.keys, call.plane_type);
  const auto values = dense_values(call.batch, call.values, call.plane_type);
  Attention(call.batch, *keys, *values, Normalized(call)).run();
}

}  // namespace kvist
