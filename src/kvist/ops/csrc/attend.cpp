#include "attend.h"

#include "dense.h"
#include "results.h"

namespace kvist {

void attend(const AttendCall& call) {
  const auto keys = dense_keys(call.batch, call.keys, call.plane_type);
  const auto values = dense_values(call.batch, call.values, call.plane_type);
  const Number type = call.lse ? Number::kFloat32 : call.batch.q_type;
  Attention(call.batch, *keys, *values, Normalized(call.batch, {call.out, type, call.lse})).run();
}

}  // namespace kvist
