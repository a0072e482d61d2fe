// Sixteen lanes as two or four of the machine's own vectors, in the vector extension of GCC and Clang.
#pragma once

#include <algorithm>
#include <cmath>

#if defined(KVIST_AVX2)
#include <immintrin.h>
#endif

namespace kvist {

#if defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

typedef float NativeFloat __attribute__((vector_size(4 * kWidth)));
typedef uint32_t NativeBits __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedFloat __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint32_t UnalignedBits __attribute__((vector_size(4 * kWidth), aligned(2), may_alias));

struct Vec {
  NativeFloat part[kParts];
};

struct Pairs {  // sixteen pairs of bf16, the first of a pair in the low half
  NativeBits part[kParts];
};

#if defined(KVIST_AVX2)
inline const char* instruction_set() { return "avx2"; }
#else
inline const char* instruction_set() { return "portable"; }
#endif

// Vectors of sums that the registers hold beside the operands, and the rows that a tile spreads them over at most.
constexpr int kTileVectors = 6;
constexpr int kTileMaxRows = 6;

template <class T>
inline T in_register(T x) {
  return x;
}

template <class F>
KVIST_INLINE Vec each(F f) {
  Vec result;
  KVIST_UNROLL for (int i = 0; i < kParts; i++) result.part[i] = f(i);
  return result;
}

inline NativeFloat as_float(NativeBits x) { return (NativeFloat)x; }
inline NativeBits as_bits(NativeFloat x) { return (NativeBits)x; }

inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.part[i] + b.part[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.part[i] - b.part[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.part[i] * b.part[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.part[i] / b.part[i]; }); }

inline Vec set1(float x) { return each([&](int) { return x - NativeFloat{}; }); }
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* from) {
  return each([&](int i) { return *reinterpret_cast<const UnalignedFloat*>(from + i * kWidth); });
}
inline Vec load_half(const float* from) {
  return each([&](int i) {
    return i < kParts / 2 ? *reinterpret_cast<const UnalignedFloat*>(from + i * kWidth) : NativeFloat{};
  });
}
inline void store(float* to, Vec x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) *reinterpret_cast<UnalignedFloat*>(to + i * kWidth) = x.part[i];
}

// a * b + c: rounded once where the machine can, else twice.
KVIST_INLINE NativeFloat fma(NativeFloat a, NativeFloat b, NativeFloat c) {
#if defined(__FMA__) || defined(__aarch64__)
  NativeFloat result;
  KVIST_UNROLL for (int i = 0; i < kWidth; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#else
  return a * b + c;
#endif
}
KVIST_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}

// The larger and the smaller of the two; b when either is NaN.
inline Vec larger(Vec a, Vec b) {
  return each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}
inline Vec smaller(Vec a, Vec b) {
  return each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}

// Sum of the lanes by halves: 16 to 8 to 4 to 2 to 1.
inline float sum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  KVIST_UNROLL for (int half = kLanes / 2; half; half /= 2)
    KVIST_UNROLL for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The largest lane, when none is NaN.
inline float maximum(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  return *std::max_element(lanes, lanes + kLanes);
}

// floor(x) for x in [-200, 200], to which all others are moved. Adding 1.5 * 2^23 leaves no fraction bits.
KVIST_INLINE Vec whole(Vec x) {
  x = smaller(set1(200.0f), larger(set1(-200.0f), x));
#if defined(KVIST_AVX2)
  return each([&](int i) { return (NativeFloat)_mm256_floor_ps((__m256)x.part[i]); });
#else
  const Vec nearest = (x + set1(12582912.0f)) - set1(12582912.0f);
  return each([&](int i) { return nearest.part[i] > x.part[i] ? nearest.part[i] - 1.0f : nearest.part[i]; });
#endif
}

// x - floor(x); something finite for an infinite x.
KVIST_INLINE Vec fraction(Vec x) {
  x = smaller(set1(200.0f), larger(set1(-200.0f), x));
  return x - whole(x);
}

// x * 2^floor(n) for x in [1, 2]; 0 for n = -inf. In two steps, of which each factor is a normal number.
KVIST_INLINE Vec times_power_of_two(Vec x, Vec n) {
  const Vec power = whole(n), half = whole(power * set1(0.5f)), rest = power - half;
  const auto factor = [](NativeFloat e) {
    return as_float(as_bits(e + 12583039.0f) << 23);  // 1.5 * 2^23 + 127: the exponent stands in the low bits
  };
  return each([&](int i) { return x.part[i] * factor(half.part[i]) * factor(rest.part[i]); });
}

// The first `count` lanes of x, the others from `rest`.
inline Vec first_lanes(Vec x, int count, Vec rest) {
  float lanes[2 * kLanes];
  store(lanes, x);
  KVIST_UNROLL for (int i = 0; i < kLanes; i++) {
    const float other = rest.part[i / kWidth][i % kWidth];
    lanes[i] = i < count ? lanes[i] : other;
  }
  return load(lanes);
}

// Negative lanes of `sign` take `negative`, the others `positive`.
inline Vec by_sign(Vec sign, Vec negative, Vec positive) {
  return each([&](int i) { return (as_bits(sign.part[i]) >> 31) != 0 ? negative.part[i] : positive.part[i]; });
}

inline Vec absolute(Vec x) {
  return each([&](int i) { return as_float(as_bits(x.part[i]) & 0x7fffffffu); });
}

inline Vec larger_magnitude(Vec a, Vec b) { return larger(absolute(a), absolute(b)); }

inline Vec square_root(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  KVIST_UNROLL for (int i = 0; i < kLanes; i++) lanes[i] = std::sqrt(lanes[i]);
  return load(lanes);
}

// `yes` in the lanes where a > b.
inline Vec where_greater(Vec a, Vec b, Vec yes, Vec no) {
  return each([&](int i) { return a.part[i] > b.part[i] ? yes.part[i] : no.part[i]; });
}

inline Vec load(const BFloat16* from) {
  Vec result;
  KVIST_UNROLL for (int i = 0; i < kParts; i++) {
    NativeBits bits;
    KVIST_UNROLL for (int j = 0; j < kWidth; j++) bits[j] = static_cast<uint32_t>(from[i * kWidth + j].bits) << 16;
    result.part[i] = as_float(bits);
  }
  return result;
}

// Rounds to nearest even, as PyTorch does; every NaN becomes the quiet one.
inline void store(BFloat16* to, Vec x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) {
    const NativeBits bits = as_bits(x.part[i]);
    NativeBits rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    rounded = x.part[i] != x.part[i] ? NativeBits{} + 0x7fc0u : rounded;
    KVIST_UNROLL for (int j = 0; j < kWidth; j++) to[i * kWidth + j].bits = static_cast<uint16_t>(rounded[j]);
  }
}

// fp16 bits to float: the exponent is moved by a product with 2^112, which is exact also for subnormal numbers.
inline NativeFloat widen(NativeBits half) {
  const NativeBits sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const NativeBits finite = as_bits(as_float(magnitude) * 5.192296858534828e33f);
  return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

inline Vec load(const Float16* from) {
#if defined(KVIST_AVX2) && defined(__F16C__)
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  return each([&](int i) { return (NativeFloat)_mm256_cvtph_ps(_mm_loadu_si128(halves + i)); });
#else
  return each([&](int i) {
    NativeBits bits;
    KVIST_UNROLL for (int j = 0; j < kWidth; j++) bits[j] = from[i * kWidth + j].bits;
    return widen(bits);
  });
#endif
}

inline Vec load_half(const Float16* from) {
  Float16 lanes[kLanes] = {};
  std::memcpy(lanes, from, kLanes / 2 * sizeof(Float16));
  return load(lanes);
}

// Float to fp16 bits, to nearest even. Below 2^-14 the sum with 0.5 has the spacing of subnormal fp16 numbers.
inline NativeBits narrow(NativeFloat x) {
  const NativeBits sign = (as_bits(x) >> 16) & 0x8000u, magnitude = as_bits(x) & 0x7fffffffu;
  const NativeBits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const NativeBits subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  NativeBits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? NativeBits{} + 0x7c00u : half;
  return sign | (magnitude > 0x7f800000u ? NativeBits{} + 0x7e00u : half);
}

inline void store(Float16* to, Vec x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) {
    const NativeBits half = narrow(x.part[i]);
    KVIST_UNROLL for (int j = 0; j < kWidth; j++) to[i * kWidth + j].bits = static_cast<uint16_t>(half[j]);
  }
}

// As the operands of dot_pairs.
inline void store_as_pairs(uint32_t* to, Vec x) { store(reinterpret_cast<BFloat16*>(to), x); }

inline Pairs load_pairs(const BFloat16* from) {
  Pairs result;
  KVIST_UNROLL for (int i = 0; i < kParts; i++)
    result.part[i] = *reinterpret_cast<const UnalignedBits*>(from + 2 * i * kWidth);
  return result;
}

// Sixteen bytes as numbers.
inline Vec byte_numbers(const uint8_t* from) {
  typedef uint8_t NativeBytes __attribute__((vector_size(kWidth)));
  return each([&](int i) {
    NativeBytes bytes;
    std::memcpy(&bytes, from + i * kWidth, sizeof(bytes));
    return __builtin_convertvector(bytes, NativeFloat);
  });
}

// The `kBits` bits from bit `first` on of each of sixteen groups of four bytes, as numbers, less `middle`. They become
// the low bits of 2^23.
template <int kBits>
inline Vec bits_of_fours(const uint8_t* from, unsigned first, float middle) {
  return each([&](int i) {
    const NativeBits fours = *reinterpret_cast<const UnalignedBits*>(from + 4 * i * kWidth);
    return as_float(((fours >> first) & ((1u << kBits) - 1)) | 0x4b000000u) - (8388608.0f + middle);
  });
}

inline Pairs load_half_pairs(const BFloat16* from) {
  Pairs result = {};
  KVIST_UNROLL for (int i = 0; i < kParts / 2; i++)
    result.part[i] = *reinterpret_cast<const UnalignedBits*>(from + 2 * i * kWidth);
  return result;
}

inline Pairs spread_pair(uint32_t pair) {
  Pairs result;
  KVIST_UNROLL for (int i = 0; i < kParts; i++) result.part[i] = pair - NativeBits{};
  return result;
}

inline Pairs first_of_pairs(Pairs x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) x.part[i] &= 0xffffu;
  return x;
}

inline Pairs second_of_pairs(Pairs x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) x.part[i] &= 0xffff0000u;
  return x;
}

// acc + both products of each pair.
inline Vec dot_pairs(Vec acc, Pairs a, Pairs b) {
  return each([&](int i) {
    const NativeFloat first = fma(as_float(a.part[i] << 16), as_float(b.part[i] << 16), acc.part[i]);
    return fma(as_float(a.part[i] & 0xffff0000u), as_float(b.part[i] & 0xffff0000u), first);
  });
}

}  // namespace kvist
