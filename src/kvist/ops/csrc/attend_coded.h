// Attention over coded blocks, merged with that over each row's own block, and over keys that are made of the values,
// as plain pointers. bindings_coded.cpp and bindings_made.cpp check everything before they call.
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

// How keys are made of values: times the weights, then dimension i rotated with i + head_dim / 2, for the first `pairs`.
struct Tie {
  const float* weight;  // [head_dim]
  const float* cos;     // [positions / 16, pairs, 16], and the next the same
  const float* sin;
  int64_t pairs;
  const int32_t* offsets;  // [sequences]: the position of each one's first token, a multiple of sixteen
};

struct AttendMadeCall {
  Batch batch;
  StreamPlanes values;
  std::optional<StreamPlanes> behind;  // what keys have behind the values
  std::optional<Tie> tie;              // or what they are made with
  const float* own;                    // as above, or null: then a query sees the tokens up to its own
  const float* lse;
  float* out;      // [T, query_heads, head_dim]
  float* out_lse;  // [T, query_heads]
};

void attend_made(const AttendMadeCall& call);

}  // namespace kvist
