// Storing keys and values in their planes.
#pragma once

#include <cstdint>

#include "number.h"

namespace kvist {

struct WriteCall {
  const void* k;  // [tokens, heads, head_dim], tokens k_stride apart
  const void* v;  // likewise
  int64_t k_stride, v_stride;
  Number type;

  void* keys;  // the planes; see packing.py
  void* values;
  Number plane_type;
  int64_t heads, block_size, head_dim;

  const int64_t* slots;  // [tokens], -1 for padding
  int64_t tokens;
};

void write(const WriteCall& call);

}  // namespace kvist
