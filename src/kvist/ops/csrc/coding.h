// How vectors become codes: what kvist/ops/coding.py describes, as the kernels take it.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "number.h"

namespace kvist {

constexpr int64_t kMaxCodedDim = 512;
constexpr int64_t kMaxCodedBlock = 64;

enum class Rule { kAbsmax, kSignedMax, kUnbiased, kLeastSquares };

struct Segment {
  int64_t first, dims;  // channels of the frame
  int64_t bits;
  std::array<int8_t, 16> levels;  // 2^bits ascending; none for 8 bits
  float per_deviation;
};

struct Coding {
  Rule rule;
  std::vector<int64_t> rotation;  // Hadamard blocks, none to leave channels as they are
  std::vector<Segment> segments;
  int64_t dim;

  // Bytes of the codes of one block and head, and of the segments before this one in a tile or block of `tokens`.
  int64_t code_bytes(int64_t tokens) const { return bytes_before(count(), tokens); }
  int64_t bytes_before(int64_t segment, int64_t tokens) const {
    int64_t bits = 0;
    for (int64_t i = 0; i < segment; i++) bits += segments[i].dims * segments[i].bits;
    return bits * tokens / 8;
  }
  int64_t count() const { return static_cast<int64_t>(segments.size()); }
};

// Where the heads of a stream are put before they are coded: mean and order [heads, dim], signs [dim].
struct Frame {
  const float* mean;
  const int32_t* order;
  const float* signs;
};

// The planes of a coded stream.
struct CodedStream {
  const Coding& coding;
  Frame frame;
  const uint8_t* codes;   // [blocks, heads, code_bytes]
  const Float16* scales;  // [blocks, heads, segments, block_size]
};

// f(std::integral_constant) with the bits of a code.
template <class F>
inline void with_bits(int64_t bits, F f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace kvist
