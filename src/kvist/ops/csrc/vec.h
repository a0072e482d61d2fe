// Sixteen floats at a time: the primitives of the machine, and the functions built from them alone.
//
// Every kernel is written against this interface. vec_avx512.h gives it one 512-bit register; vec_portable.h gives it
// whatever vectors the compiler has, and some of AVX2's instructions where they are. KVIST_PORTABLE chooses the latter on
// any machine, without those instructions and without bytes_avx2.h, so that it can be tested there.
#pragma once

#include <cstdint>
#include <cstring>

#include "number.h"

namespace kvist {

constexpr int kLanes = 16;

}  // namespace kvist

// A loop over an array of vectors must be unrolled, or the array lives in memory.
#if defined(__clang__)
#define KVIST_UNROLL _Pragma("unroll")
#else
#define KVIST_UNROLL _Pragma("GCC unroll 16")
#endif

// Where a vector is several of the machine's, a function that is called passes it through memory.
#define KVIST_INLINE inline __attribute__((always_inline))

#if !defined(KVIST_PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define KVIST_AVX512
#include "vec_avx512.h"
#else
#if !defined(KVIST_PORTABLE) && defined(__AVX2__)
#define KVIST_AVX2
#endif
#include "vec_portable.h"
#endif

namespace kvist {

// Starts to bring a cache line into the second-level cache.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// The first `count` numbers, at most sixteen, zeros after them; reads nothing beyond.
template <class T>
inline Vec load_first(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

// The first `count` lanes, at most sixteen; writes nothing beyond.
template <class T>
inline void store_first(T* to, Vec x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(T));
}

// 2^f for f in [0, 1], minimax (relative error 2e-9), exactly 1 at 0.
KVIST_INLINE Vec exp2_of_fraction(Vec f) {
  Vec p = set1(2.16129192e-4f);
  p = fma(p, f, set1(1.24678458e-3f));
  p = fma(p, f, set1(9.67545155e-3f));
  p = fma(p, f, set1(5.54852821e-2f));
  p = fma(p, f, set1(2.40229309e-1f));
  p = fma(p, f, set1(6.93147063e-1f));
  return fma(p, f, set1(1.0f));
}

// 2^x to 2 ulp; exp2(-inf) = 0, NaN stays NaN.
KVIST_INLINE Vec exp2(Vec x) { return times_power_of_two(exp2_of_fraction(fraction(x)), x); }

// e^x to 2 ulp; exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
KVIST_INLINE Vec exp(Vec x) {
  x = smaller(set1(89.0f), larger(set1(-105.0f), x));
  const Vec y = x * set1(1.44269504f), n = y - fraction(y);
  const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));  // x - n ln 2, in two exact steps
  return times_power_of_two(exp2_of_fraction(r * set1(1.44269504f)), n);
}

// erfc(x) for x >= 0, NaN for NaN: t exp(P(t) - x^2) with t = 1 / (1 + x / 2), P minimax (error 7e-8).
inline Vec erfc_positive(Vec x) {
  const Vec t = set1(1.0f) / fma(x, set1(0.5f), set1(1.0f));
  Vec p = set1(1.70288235e-1f);
  p = fma(p, t, set1(-8.17278624e-1f));
  p = fma(p, t, set1(1.47328734f));
  p = fma(p, t, set1(-1.11042023f));
  p = fma(p, t, set1(2.55252242e-1f));
  p = fma(p, t, set1(-1.72551945e-1f));
  p = fma(p, t, set1(9.19202864e-2f));
  p = fma(p, t, set1(3.75094444e-1f));
  p = fma(p, t, set1(9.99916017e-1f));
  p = fma(p, t, set1(-1.26550770f));
  return t * exp(p - x * x);
}

}  // namespace kvist
