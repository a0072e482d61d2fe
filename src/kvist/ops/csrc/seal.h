// Coding whole blocks of one stream, as plain pointers. bindings_coded.cpp checks everything before it calls.
#pragma once

#include "coding.h"

namespace kvist {

struct SealCall {
  const void* open;  // a plane in full precision; see packing.py
  Number open_type;
  bool keys;
  int64_t heads, block_size, head_dim;

  const Coding* coding;  // or null: `plane` is a plane of numbers
  Frame frame;
  uint8_t* codes;
  Float16* scales;
  void* plane;
  Number plane_type;

  const int64_t* sources;  // [count] blocks of `open`
  const int64_t* targets;  // [count] blocks of the planes
  int64_t count;
};

void seal(const SealCall& call);

}  // namespace kvist
