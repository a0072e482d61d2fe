// Two 256-bit registers.
#pragma once

#include <immintrin.h>

namespace kvist {

// Two members, not an array: GCC keeps arrays of arrays in memory.
struct Ints {
  __m256i low, high;
};
using Bytes = Ints;

// Vectors of sums that the registers hold beside the operands.
constexpr int kSumVectors = 4;

inline Ints in_register(Ints x) {
  asm("" : "+x"(x.low), "+x"(x.high));
  return x;
}

inline Bytes load_bytes(const void* from) {
  const __m256i* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_bytes(void* to, Bytes x) {
  __m256i* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.low);
  _mm256_storeu_si256(halves + 1, x.high);
}
inline Ints set1_int(int32_t x) {
  const __m256i half = _mm256_set1_epi32(x);
  return {half, half};
}
inline Bytes spread_bytes(const uint8_t* four) {
  int32_t lane;
  std::memcpy(&lane, four, sizeof(lane));
  return set1_int(lane);
}

inline Ints load_ints(const int32_t* from) { return load_bytes(from); }
inline void store_ints(int32_t* to, Ints x) { store_bytes(to, x); }
inline Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

inline Vec to_float(Ints x) {
  return {(NativeFloat)_mm256_cvtepi32_ps(x.low), (NativeFloat)_mm256_cvtepi32_ps(x.high)};
}
// To nearest even; anything for what no int32 holds.
inline Ints to_ints(Vec x) {
  return {_mm256_cvtps_epi32((__m256)x.part[0]), _mm256_cvtps_epi32((__m256)x.part[1])};
}

// What each code, below 16, stands for.
inline Vec look_up(const float* sixteen, Ints codes) {
  const auto half = [&](__m256i eight) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(sixteen), eight);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(sixteen + 8), eight);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(eight, 28));  // the sign is bit 3
    return (NativeFloat)_mm256_blendv_ps(low, high, upper);
  };
  return {half(codes.low), half(codes.high)};
}

// acc + the four products of each lane: a a level plus kByteOffset, b a signed byte.
#if defined(__AVXVNNI__)
constexpr int kByteOffset = 128;
inline __m256i dot_half(__m256i acc, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(acc, a, b); }
#else
// The instruction for bytes (vpmaddubsw) saturates, but not at 2 * 128 * 127. So the operands are as signed as they are
// meant, and the one takes its sign from the other.
constexpr int kByteOffset = 0;
inline __m256i add_pairs(__m256i acc, __m256i pairs) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline __m256i dot_half(__m256i acc, __m256i a, __m256i b) {
  return add_pairs(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(a, b)));
}
#endif
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) {
  return {dot_half(acc.low, a.low, b.low), dot_half(acc.high, a.high, b.high)};
}

inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)});
}

#if !defined(__AVXVNNI__)
#define KVIST_SIGNED_BYTES
inline Bytes with_offset(Bytes x) {
  const __m256i flipped = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(x.low, flipped), _mm256_xor_si256(x.high, flipped)};
}
// Nothing saturates: a nibble is 15 at most.
inline Ints dot_nibbles(Ints acc, Bytes low, Bytes high, Bytes b, Bytes next) {
  const auto half = [](__m256i acc, __m256i low, __m256i high, __m256i b, __m256i next) {
    return add_pairs(acc, _mm256_add_epi16(_mm256_maddubs_epi16(low, b), _mm256_maddubs_epi16(high, next)));
  };
  return {half(acc.low, low.low, high.low, b.low, next.low), half(acc.high, low.high, high.high, b.high, next.high)};
}
#endif

inline void store_low_bytes(uint8_t* to, Ints x) {
  const auto low_of = [](__m256i a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24); };
  const __m256i words = _mm256_packs_epi32(low_of(x.low), low_of(x.high));  // by four: 0, 2, 1, 3
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(ordered));
}

// The digits of sixteen numbers, or of four times as many.
inline void store_digits(uint8_t* high, uint8_t* low, Ints x) {
  const __m256i half = _mm256_set1_epi32(128);
  store_low_bytes(low, x);
  store_low_bytes(high, {_mm256_srai_epi32(_mm256_add_epi32(x.low, half), 8),
                         _mm256_srai_epi32(_mm256_add_epi32(x.high, half), 8)});
}
inline void store_digits(uint8_t* high, uint8_t* low, const Ints (&x)[4]) {
  for (int i = 0; i < 4; i++) store_digits(high + i * kLanes, low + i * kLanes, x[i]);
}

inline void fill_tables(Levels& levels, const uint8_t* bytes, int64_t) {
  for (int i = 0; i < 64; i++) levels.table[0][i] = bytes[i % 16];
}

// 4 in the bytes whose bit is set.
inline __m256i four_where_set(const uint8_t* bits) {
  int32_t all;
  std::memcpy(&all, bits, sizeof(all));
  const __m256i by_eight = _mm256_shuffle_epi8(
      _mm256_set1_epi32(all), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i one_each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(by_eight, one_each), one_each);
  return _mm256_and_si256(set, _mm256_set1_epi8(4));
}

// Four steps of a column that has `steps`, as bytes: steps 4 * chunk and on.
template <int kBits>
inline void decode_steps(const uint8_t* column, int64_t steps, int64_t chunk, const Levels& levels, Bytes (&out)[4]) {
  constexpr int kSteps = kBits == 8 ? 1 : kBits == 4 ? 2 : 4;  // in 64 bytes
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(levels.table[0]));
  const __m256i mask = _mm256_set1_epi8(kBits == 4 ? 15 : 3);
  KVIST_UNROLL for (int i = 0; i < 4; i++) {
    const uint8_t* codes = column + 256 / kSteps * chunk + 64 * (i / kSteps);
    const auto half = [&](int j) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + j);
      if constexpr (kBits == 8) {
        return _mm256_xor_si256(bytes, table);
      } else {
        __m256i index = _mm256_and_si256(_mm256_srli_epi16(bytes, 8 / kSteps * (i % kSteps)), mask);
        if constexpr (kBits == 3)
          index = _mm256_add_epi8(index, four_where_set(column + 16 * steps + 32 * chunk + 8 * i + 4 * j));
        return _mm256_shuffle_epi8(table, index);
      }
    };
    out[i] = {half(0), half(1)};
  }
}

}  // namespace kvist
