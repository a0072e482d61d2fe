// Attention over paged keys and values, as plain pointers. bindings.cpp checks everything before it calls.
#pragma once

#include "batch.h"

namespace kvist {

struct AttendCall {
  Batch batch;
  const void* keys;  // the planes; see packing.py
  const void* values;
  Number plane_type;
  void* out;  // [T, query_heads, head_dim], contiguous, in q's type, or float where lse is wanted
  float* lse;  // [T, query_heads]: log2 of the sum of exp of the scaled scores, or null
};

void attend(const AttendCall& call);

}  // namespace kvist
