// Attention over coded blocks, merged with that over each row's own block, as plain pointers. bindings_coded.cpp checks
// everything before it calls.
#pragma once

#include <optional>

#include "batch.h"
#include "coding.h"

namespace kvist {

// A stream that is coded, or one plane of numbers; see packing.py.
struct StreamPlanes {
  std::optional<CodedStream> coded;
  const void* plane;
  Number type;
};

struct AttendCodedCall {
  Batch batch;
  StreamPlanes keys, values;
  const float* own;  // [T, query_heads, head_dim]: attention over each row's own block
  const float* lse;  // [T, query_heads]: log2 of the sum of exp of the scaled scores there
  void* out;         // [T, query_heads, head_dim] in q's type
};

void attend_coded(const AttendCodedCall& call);

}  // namespace kvist
