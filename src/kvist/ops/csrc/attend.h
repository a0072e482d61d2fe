// Attention over paged keys and values, as plain pointers. bindings.cpp checks everything before it calls.
#pragma once

#include <cstdint>

#include "number.h"

namespace kvist {

constexpr int64_t kSplit = 512;  // tokens from one cut of a sequence to the next
constexpr int64_t kMaxHeadDim = 256;

struct AttendCall {
  const void* q;  // [T, query_heads, head_dim], rows q_stride apart
  int64_t q_stride;
  void* out;  // the same, contiguous
  Number q_type;

  const void* keys;  // the planes; see packing.py
  const void* values;
  Number plane_type;
  int64_t heads, block_size, head_dim;

  const int32_t* tables;  // [sequences, table_stride]
  int64_t table_stride;
  const int32_t* starts;   // [sequences + 1]
  const int32_t* lengths;  // [sequences]
  int64_t sequences;

  int64_t query_heads;
  double scale;

  int64_t queries(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
};

void attend(const AttendCall& call);

}  // namespace kvist
