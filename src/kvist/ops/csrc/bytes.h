// Sixteen lanes of four bytes, and of one int32: the operands and the sums of an instruction that multiplies four bytes
// by four and adds them up. Codes become such bytes here: their levels plus kByteOffset, which is 128 where the one
// operand is unsigned, and 0 where it is not. Levels are never -128.
//
// bytes_avx512.h, bytes_avx2.h and bytes_portable.h give the same integers; vec.h says how one is chosen.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "vec.h"

namespace kvist {

// Levels plus an offset, in tables that an instruction looks up. For 8-bit codes: what they are exclusive-or'ed with.
struct Levels {
  alignas(64) uint8_t table[6][64];
};

}  // namespace kvist

#if defined(KVIST_AVX512)
#include "bytes_avx512.h"
#elif defined(KVIST_AVX2)
#include "bytes_avx2.h"
#else
#include "bytes_portable.h"
#endif

namespace kvist {

#if !defined(KVIST_SIGNED_BYTES)
// Bytes that are levels plus 128, as levels plus kByteOffset.
inline Bytes with_offset(Bytes x) { return x; }
// acc + the products of low nibbles with four numbers, and of high ones with the next.
inline Ints dot_nibbles(Ints acc, Bytes low, Bytes high, Bytes b, Bytes next) {
  return dot_bytes(dot_bytes(acc, low, b), high, next);
}
#endif

inline Levels make_levels(const std::array<int8_t, 16>& levels, int64_t bits, int offset = kByteOffset) {
  Levels result = {};
  uint8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = static_cast<uint8_t>(levels[i % (1 << bits)] + offset);
  if (bits == 8)
    std::memset(result.table[0], offset, sizeof(result.table[0]));
  else
    fill_tables(result, bytes, bits);
  return result;
}

#if !defined(KVIST_AVX512)
// 2^kBits - 1 borders, ascending, and how many of them each number reaches.
struct Borders {
  float border[16];
};

inline Borders make_borders(const float* borders) {
  Borders result;
  std::memcpy(result.border, borders, sizeof(result.border));
  return result;
}

template <int kBits>
inline Ints count_borders(Vec x, const Borders& borders) {
  Vec passed[3] = {zero(), zero(), zero()};  // chains that hide each other's latency
  KVIST_UNROLL for (int i = 0; i + 1 < 1 << kBits; i++)
    passed[i % 3] = passed[i % 3] + each([&](int j) {
      return as_float((NativeBits)(x.part[j] >= borders.border[i]) & as_bits(set1(1).part[j]));
    });
  return to_ints(passed[0] + passed[1] + passed[2]);
}
#endif

// A number of 16 bits is high * 256 + low, both signed bytes.
constexpr int kDigitReach = 127 * 256 + 127;

}  // namespace kvist
