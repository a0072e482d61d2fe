// Two 256-bit registers.
#pragma once

#include <immintrin.h>

namespace kvist {

struct Ints {
  __m256i half[2];
};
using Bytes = Ints;

// Vectors of sums that the registers hold beside the operands.
constexpr int kSumVectors = 4;

inline Bytes load_bytes(const void* from) {
  const __m256i* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_bytes(void* to, Bytes x) {
  __m256i* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.half[0]);
  _mm256_storeu_si256(halves + 1, x.half[1]);
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
  return {_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])};
}

inline Vec to_float(Ints x) {
  Vec result;
  for (int i = 0; i < 2; i++) result.part[i] = (NativeFloat)_mm256_cvtepi32_ps(x.half[i]);
  return result;
}
// To nearest even; anything for what no int32 holds.
inline Ints to_ints(Vec x) {
  return {_mm256_cvtps_epi32((__m256)x.part[0]), _mm256_cvtps_epi32((__m256)x.part[1])};
}

// What each code, below 16, stands for.
inline Vec look_up(const float* sixteen, Ints codes) {
  Vec result;
  for (int i = 0; i < 2; i++) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(sixteen), codes.half[i]);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(sixteen + 8), codes.half[i]);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes.half[i], 28));  // the sign is bit 3
    result.part[i] = (NativeFloat)_mm256_blendv_ps(low, high, upper);
  }
  return result;
}

// acc + the four products of each lane, a unsigned, b signed. Where the machine cannot do it in one step, even and odd
// bytes are widened: the instruction for bytes (vpmaddubsw) would saturate.
inline __m256i dot_half(__m256i acc, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, a, b);
#else
  const __m256i a0 = _mm256_and_si256(a, _mm256_set1_epi16(0xff)), a1 = _mm256_srli_epi16(a, 8);
  const __m256i b0 = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b1 = _mm256_srai_epi16(b, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(a0, b0), _mm256_madd_epi16(a1, b1)));
#endif
}
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) {
  return {dot_half(acc.half[0], a.half[0], b.half[0]), dot_half(acc.half[1], a.half[1], b.half[1])};
}

inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.half[0], mask), _mm256_and_si256(x.half[1], mask)};
}
inline Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.half[0], 4), _mm256_srli_epi16(x.half[1], 4)});
}

inline void store_low_bytes(uint8_t* to, Ints x) {
  const auto low_of = [](__m256i a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24); };
  const __m256i words = _mm256_packs_epi32(low_of(x.half[0]), low_of(x.half[1]));  // by four: 0, 2, 1, 3
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(ordered));
}

// The digits of sixteen numbers, or of four times as many.
inline void store_digits(uint8_t* high, uint8_t* low, Ints x) {
  const __m256i half = _mm256_set1_epi32(128);
  store_low_bytes(low, x);
  store_low_bytes(high, {_mm256_srai_epi32(_mm256_add_epi32(x.half[0], half), 8),
                         _mm256_srai_epi32(_mm256_add_epi32(x.half[1], half), 8)});
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
    const Bytes codes = load_bytes(column + 256 / kSteps * chunk + 64 * (i / kSteps));
    KVIST_UNROLL for (int j = 0; j < 2; j++) {
      if constexpr (kBits == 8) {
        out[i].half[j] = _mm256_xor_si256(codes.half[j], table);
      } else {
        __m256i index = _mm256_and_si256(_mm256_srli_epi16(codes.half[j], 8 / kSteps * (i % kSteps)), mask);
        if constexpr (kBits == 3)
          index = _mm256_add_epi8(index, four_where_set(column + 16 * steps + 32 * chunk + 8 * i + 4 * j));
        out[i].half[j] = _mm256_shuffle_epi8(table, index);
      }
    }
  }
}

}  // namespace kvist
