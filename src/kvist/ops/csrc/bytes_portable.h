// Sixteen lanes as two or four of the machine's own vectors. Codes are looked up one by one.
#pragma once

namespace kvist {

typedef int32_t NativeInts __attribute__((vector_size(4 * kWidth)));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));

struct Ints {
  NativeInts part[kParts];
};
using Bytes = Ints;

// Vectors of sums that the registers hold beside the operands.
constexpr int kSumVectors = 2;

template <class F>
inline Ints each_int(F f) {
  Ints result;
  KVIST_UNROLL for (int i = 0; i < kParts; i++) result.part[i] = f(i);
  return result;
}

inline Ints set1_int(int32_t x) { return each_int([&](int) { return x - NativeInts{}; }); }
inline Ints load_ints(const int32_t* from) {
  return each_int([&](int i) { return *reinterpret_cast<const UnalignedInts*>(from + i * kWidth); });
}
inline void store_ints(int32_t* to, Ints x) {
  KVIST_UNROLL for (int i = 0; i < kParts; i++) *reinterpret_cast<UnalignedInts*>(to + i * kWidth) = x.part[i];
}
inline Ints add(Ints a, Ints b) { return each_int([&](int i) { return a.part[i] + b.part[i]; }); }

inline Bytes load_bytes(const void* from) {
  Bytes result;
  std::memcpy(&result, from, sizeof(result));
  return result;
}
inline void store_bytes(void* to, Bytes x) { std::memcpy(to, &x, sizeof(x)); }
inline Bytes spread_bytes(const uint8_t* four) {
  int32_t lane;
  std::memcpy(&lane, four, sizeof(lane));
  return set1_int(lane);
}

inline Vec to_float(Ints x) { return each([&](int i) { return __builtin_convertvector(x.part[i], NativeFloat); }); }
// To nearest even below 2^22; anything for what is beyond. Adding 1.5 * 2^23 leaves the number in the low bits.
inline Ints to_ints(Vec x) {
  return each_int([&](int i) { return (NativeInts)as_bits(x.part[i] + 12582912.0f) - 0x4b400000; });
}

// What each code, below 16, stands for.
inline Vec look_up(const float* sixteen, Ints codes) {
  float lanes[kLanes];
  KVIST_UNROLL for (int i = 0; i < kLanes; i++) lanes[i] = sixteen[codes.part[i / kWidth][i % kWidth]];
  return load(lanes);
}

constexpr int kByteOffset = 128;

// acc + the four products of each lane, a unsigned, b signed.
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) {
  return each_int([&](int i) {
    NativeInts total = acc.part[i];
    KVIST_UNROLL for (int byte = 0; byte < 4; byte++)
      total += (a.part[i] >> (8 * byte) & 0xff) * ((NativeInts)((NativeBits)b.part[i] << (24 - 8 * byte)) >> 24);
    return total;
  });
}

inline Bytes low_nibbles(Bytes x) { return each_int([&](int i) { return x.part[i] & 0x0f0f0f0f; }); }
inline Bytes high_nibbles(Bytes x) { return each_int([&](int i) { return x.part[i] >> 4 & 0x0f0f0f0f; }); }

inline void store_low_bytes(uint8_t* to, Ints x) {
  KVIST_UNROLL for (int i = 0; i < kLanes; i++) to[i] = static_cast<uint8_t>(x.part[i / kWidth][i % kWidth]);
}

// The digits of sixteen numbers, or of four times as many.
inline void store_digits(uint8_t* high, uint8_t* low, Ints x) {
  store_low_bytes(low, x);
  store_low_bytes(high, each_int([&](int i) { return (x.part[i] + 128) >> 8; }));
}
inline void store_digits(uint8_t* high, uint8_t* low, const Ints (&x)[4]) {
  for (int i = 0; i < 4; i++) store_digits(high + i * kLanes, low + i * kLanes, x[i]);
}

inline void fill_tables(Levels& levels, const uint8_t* bytes, int64_t) { std::memcpy(levels.table[0], bytes, 16); }

// Four steps of a column that has `steps`, as bytes: steps 4 * chunk and on.
template <int kBits>
inline void decode_steps(const uint8_t* column, int64_t steps, int64_t chunk, const Levels& levels, Bytes (&out)[4]) {
  constexpr int kSteps = kBits == 8 ? 1 : kBits == 4 ? 2 : 4;  // in 64 bytes
  constexpr uint8_t kMask = kBits == 4 ? 15 : 3;
  for (int i = 0; i < 4; i++) {
    const uint8_t* codes = column + 256 / kSteps * chunk + 64 * (i / kSteps);
    const uint8_t* high = column + 16 * steps + 32 * chunk + 8 * i;
    uint8_t step[64];
    for (int j = 0; j < 64; j++) {
      if constexpr (kBits == 8) {
        step[j] = codes[j] ^ levels.table[0][0];
      } else {
        int index = codes[j] >> (8 / kSteps * (i % kSteps)) & kMask;
        if constexpr (kBits == 3) index += 4 * (high[j / 8] >> (j % 8) & 1);
        step[j] = levels.table[0][index];
      }
    }
    out[i] = load_bytes(step);
  }
}

}  // namespace kvist
