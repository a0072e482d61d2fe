// One 512-bit register.
#pragma once

namespace kvist {

using Bytes = __m512i;
using Ints = __m512i;

// Vectors of sums that the registers hold beside the operands.
constexpr int kSumVectors = 24;

inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(void* to, Bytes x) { _mm512_storeu_si512(to, x); }
inline Bytes spread_bytes(const uint8_t* four) {
  int32_t lane;
  std::memcpy(&lane, four, sizeof(lane));
  return _mm512_set1_epi32(lane);
}

inline Ints set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store_ints(int32_t* to, Ints x) { _mm512_storeu_si512(to, x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

inline Vec to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
// To nearest even; anything for what no int32 holds.
inline Ints to_ints(Vec x) { return _mm512_cvtps_epi32(x); }

// What each code, below 16, stands for.
inline Vec look_up(const float* sixteen, Ints codes) { return _mm512_permutexvar_ps(codes, load(sixteen)); }

// 2^kBits - 1 borders, ascending, and how many of them each number reaches: found by halving.
struct Borders {
  Vec by_half[4];  // lane i holds border i + half - 1, for halves 1, 2, 4, 8
};

inline Borders make_borders(const float* sixteen) {
  Borders result;
  for (int bit = 0; bit < 4; bit++) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = sixteen[std::min(15, i + (1 << bit) - 1)];
    result.by_half[bit] = load(lanes);
  }
  return result;
}

template <int kBits>
inline Ints count_borders(Vec x, const Borders& borders) {
  Ints count = set1_int(0);
  KVIST_UNROLL for (int bit = kBits - 1; bit >= 0; bit--) {
    const Vec border = _mm512_permutexvar_ps(count, borders.by_half[bit]);
    count = _mm512_mask_add_epi32(count, _mm512_cmp_ps_mask(x, border, _CMP_GE_OQ), count, set1_int(1 << bit));
  }
  return count;
}

constexpr int kByteOffset = 128;

// acc + the four products of each lane, a unsigned, b signed.
inline Ints dot_bytes(Ints acc, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
  // Written out: GCC 12 copies the sum around the intrinsic, and keeps it in memory.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#else
  const __m512i a0 = _mm512_and_si512(a, _mm512_set1_epi16(0xff)), a1 = _mm512_srli_epi16(a, 8);
  const __m512i b0 = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), b1 = _mm512_srai_epi16(b, 8);
  return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(a0, b0), _mm512_madd_epi16(a1, b1)));
#endif
}

inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

inline void store_low_bytes(uint8_t* to, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
}

// The digits of sixteen numbers, or of four times as many.
inline void store_digits(uint8_t* high, uint8_t* low, Ints x) {
  store_low_bytes(low, x);
  store_low_bytes(high, _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8));
}
inline void store_digits(uint8_t* high, uint8_t* low, const Ints (&x)[4]) {
  // Packing leaves four numbers of each vector in turn in each 128 bits.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
  const __m512i byte = _mm512_set1_epi16(0xff), half = _mm512_set1_epi16(128);
  const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
  const __m512i upper = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                           _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
  store_bytes(low, _mm512_permutexvar_epi32(order, lower));
  store_bytes(high, _mm512_permutexvar_epi32(order, upper));
}

#if defined(__AVX512VBMI__)

// vpermb looks at six bits of a byte. A table of 4-bit codes stands in it four times, so the two upper bits do not
// matter; one of 2-bit codes stands in it for the lowest, the middle and the upper two of the six. For 3 bits these
// are the levels without the high bit, and behind them those with it.
inline void fill_tables(Levels& levels, const uint8_t* bytes, int64_t bits) {
  for (int i = 0; i < 64; i++) {
    if (bits == 4) levels.table[0][i] = bytes[i % 16];
    for (int place = 0; place < 3 && bits != 4; place++) {
      levels.table[place][i] = bytes[i >> (2 * place) & 3];
      if (bits == 3) levels.table[3 + place][i] = bytes[4 + (i >> (2 * place) & 3)];
    }
  }
}

// Four steps of a column that has `steps`, as bytes: steps 4 * chunk and on.
template <int kBits>
inline void decode_steps(const uint8_t* column, int64_t steps, int64_t chunk, const Levels& levels, Bytes (&out)[4]) {
  const Bytes table = load_bytes(levels.table[0]);
  if constexpr (kBits == 8) {
    KVIST_UNROLL for (int i = 0; i < 4; i++)
      out[i] = _mm512_xor_si512(load_bytes(column + 256 * chunk + 64 * i), table);
  } else if constexpr (kBits == 4) {
    KVIST_UNROLL for (int i = 0; i < 2; i++) {
      const Bytes codes = load_bytes(column + 128 * chunk + 64 * i);
      out[2 * i] = _mm512_permutexvar_epi8(codes, table);
      out[2 * i + 1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table);
    }
  } else {
    const Bytes codes = load_bytes(column + 64 * chunk), shifted = _mm512_srli_epi16(codes, 6);
    const Bytes index[4] = {codes, codes, codes, shifted};
    KVIST_UNROLL for (int i = 0; i < 4; i++) {
      const int place = i % 3;
      out[i] = _mm512_permutexvar_epi8(index[i], load_bytes(levels.table[place]));
      if constexpr (kBits == 3) {
        uint64_t high;
        std::memcpy(&high, column + 16 * steps + 32 * chunk + 8 * i, sizeof(high));
        const Bytes upper = load_bytes(levels.table[3 + place]);
        out[i] = _mm512_mask_permutexvar_epi8(out[i], _cvtu64_mask64(high), index[i], upper);
      }
    }
  }
}

#else

inline void fill_tables(Levels& levels, const uint8_t* bytes, int64_t) {
  for (int i = 0; i < 64; i++) levels.table[0][i] = bytes[i % 16];
}

// Four steps of a column that has `steps`, as bytes: steps 4 * chunk and on.
template <int kBits>
inline void decode_steps(const uint8_t* column, int64_t steps, int64_t chunk, const Levels& levels, Bytes (&out)[4]) {
  const Bytes table = load_bytes(levels.table[0]);
  const Bytes mask = _mm512_set1_epi8(kBits == 4 ? 15 : 3);
  KVIST_UNROLL for (int i = 0; i < 4; i++) {
    if constexpr (kBits == 8) {
      out[i] = _mm512_xor_si512(load_bytes(column + 256 * chunk + 64 * i), table);
      continue;
    }
    constexpr int kSteps = kBits == 4 ? 2 : 4;  // in one vector
    const Bytes codes = load_bytes(column + 256 / kSteps * chunk + 64 * (i / kSteps));
    Bytes index = _mm512_and_si512(_mm512_srli_epi16(codes, 8 / kSteps * (i % kSteps)), mask);
    if constexpr (kBits == 3) {
      uint64_t high;
      std::memcpy(&high, column + 16 * steps + 32 * chunk + 8 * i, sizeof(high));
      index = _mm512_mask_add_epi8(index, _cvtu64_mask64(high), index, _mm512_set1_epi8(4));
    }
    out[i] = _mm512_shuffle_epi8(table, index);
  }
}

#endif

}  // namespace kvist
