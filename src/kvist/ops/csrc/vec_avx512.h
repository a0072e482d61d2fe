// One 512-bit register. bf16 products use vdpbf16ps where the machine has it.
#pragma once

#include <immintrin.h>

namespace kvist {

using Vec = __m512;
using Pairs = __m512i;  // sixteen pairs of bf16, the first of a pair in the low half

#if defined(__AVX512BF16__)
inline const char* instruction_set() { return "avx512_bf16"; }
#else
inline const char* instruction_set() { return "avx512"; }
#endif

// Vectors of sums that the registers hold beside the operands, and the rows that a tile spreads them over at most.
constexpr int kTileVectors = 24;
constexpr int kTileMaxRows = 8;

// Keeps an operand in a register for all its uses; left alone, GCC loads it again for each.
template <class T>
inline T in_register(T x) {
  asm("" : "+v"(x));
  return x;
}

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load_half(const float* from) { return _mm512_maskz_loadu_ps(0xff, from); }
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }

// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// The larger and the smaller of the two; b when either is NaN.
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }

// Sum of the lanes by halves: 16 to 8 to 4 to 2 to 1.
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }

// The largest lane, when none is NaN.
inline float maximum(Vec x) { return _mm512_reduce_max_ps(x); }

// x - floor(x); 0 for an infinite x.
inline Vec fraction(Vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// x * 2^floor(n); 0 for n = -inf.
inline Vec times_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

// The first `count` lanes of x, the others from `rest`.
inline Vec first_lanes(Vec x, int count, Vec rest) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1), rest, x);
}

// Negative lanes of `sign` take `negative`, the others `positive`.
inline Vec by_sign(Vec sign, Vec negative, Vec positive) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(sign)), positive, negative);
}

inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
inline Vec larger_magnitude(Vec a, Vec b) { return _mm512_range_ps(a, b, 0b1011); }
inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }

// `yes` in the lanes where a > b.
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}

inline Vec load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounds to nearest even, as PyTorch does; every NaN becomes the quiet one.
inline void store(BFloat16* to, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}

inline Vec load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline Vec load_half(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline void store(Float16* to, Vec x) {
  const __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}

// As the operands of dot_pairs, which takes subnormal numbers for zero.
inline void store_as_pairs(uint32_t* to, Vec x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  store(reinterpret_cast<BFloat16*>(to), x);
#endif
}

inline Pairs load_pairs(const BFloat16* from) { return _mm512_loadu_si512(from); }

// Sixteen bytes as numbers.
inline Vec byte_numbers(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// The `kBits` bits from bit `first` on of each of sixteen groups of four bytes, as numbers, less `middle`. They become
// the low bits of 2^23.
template <int kBits>
inline Vec bits_of_fours(const uint8_t* from, unsigned first, float middle) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const __m512i fours = (__m512i)((Words)_mm512_loadu_si512(from) >> first);
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1), exponent = _mm512_set1_epi32(0x4b000000);
  const __m512i bits = _mm512_ternarylogic_epi32(fours, mask, exponent, 0xea);  // (fours & mask) | exponent
  return _mm512_castsi512_ps(bits) - set1(8388608.0f + middle);
}

inline Pairs load_half_pairs(const BFloat16* from) { return _mm512_maskz_loadu_epi32(0xff, from); }
inline Pairs spread_pair(uint32_t pair) { return _mm512_set1_epi32(static_cast<int>(pair)); }
inline Pairs first_of_pairs(Pairs x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }
inline Pairs second_of_pairs(Pairs x) {
  return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// acc + both products of each pair.
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const Vec a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), a1 = _mm512_castsi512_ps(_mm512_and_si512(a, high));
  const Vec b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), b1 = _mm512_castsi512_ps(_mm512_and_si512(b, high));
  return fma(a1, b1, fma(a0, b0, acc));
#endif
}

}  // namespace kvist
