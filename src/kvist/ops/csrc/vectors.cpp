#include "vectors.h"

#include <algorithm>

namespace kvist {
namespace {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVIST_SHUFFLES
#endif
#endif

#if defined(KVIST_SHUFFLES)
using Sixteen = float __attribute__((vector_size(64)));

inline Sixteen load_sixteen(const void* from) {
  Sixteen x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline void store_sixteen(void* to, Sixteen x) { std::memcpy(to, &x, sizeof(x)); }

// Four rows → in each quarter of x[j], column 4 * quarter + j of all four.
inline void transpose_quarters(Sixteen (&x)[4]) {
  const auto low = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  };
  const auto high = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const auto firsts = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  };
  const auto seconds = [](Sixteen a, Sixteen b) {
    return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  const Sixteen a = low(x[0], x[1]), b = high(x[0], x[1]), c = low(x[2], x[3]), d = high(x[2], x[3]);
  x[0] = firsts(a, c), x[1] = seconds(a, c), x[2] = firsts(b, d), x[3] = seconds(b, d);
}

// Four vectors → each of their quarters together.
inline void gather_quarters(Sixteen a, Sixteen b, Sixteen c, Sixteen d, Sixteen (&x)[4]) {
  const auto outer = [](Sixteen a, Sixteen b) {  // quarters 0 and 2 of both
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto inner = [](Sixteen a, Sixteen b) {  // quarters 1 and 3 of both
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  const Sixteen ab = outer(a, b), cd = outer(c, d), ef = inner(a, b), gh = inner(c, d);
  x[0] = outer(ab, cd), x[1] = outer(ef, gh), x[2] = inner(ab, cd), x[3] = inner(ef, gh);
}
#endif

// rows [token][dim] → x [dim][token], sixteen of each.
void transpose(const float (*rows)[kLanes], Lanes* x) {
#if defined(KVIST_SHUFFLES)
  Sixteen part[4][4];
  for (int t = 0; t < 4; t++) {
    for (int i = 0; i < 4; i++) part[t][i] = load_sixteen(rows[4 * t + i]);
    transpose_quarters(part[t]);
  }
  for (int j = 0; j < 4; j++) {
    Sixteen columns[4];
    gather_quarters(part[0][j], part[1][j], part[2][j], part[3][j], columns);
    for (int i = 0; i < 4; i++) store_sixteen(x[4 * i + j], columns[i]);
  }
#else
  for (int d = 0; d < kLanes; d++)
    for (int t = 0; t < kLanes; t++) x[d][t] = rows[t][d];
#endif
}

// Four steps of sixteen lanes of four bytes → each lane's sixteen bytes together.
inline void transpose_fours(const Bytes (&steps)[4], uint8_t (*lanes)[kLanes]) {
  alignas(64) uint32_t words[4][kLanes];
  for (int step = 0; step < 4; step++) store_bytes(words[step], steps[step]);
#if defined(KVIST_SHUFFLES)
  Sixteen x[4];
  for (int step = 0; step < 4; step++) x[step] = load_sixteen(words[step]);
  transpose_quarters(x);
  for (int j = 0; j < 4; j++) {
    alignas(64) uint8_t quarters[4][kLanes];
    store_sixteen(quarters, x[j]);
    for (int i = 0; i < 4; i++) std::memcpy(lanes[4 * i + j], quarters[i], kLanes);
  }
#else
  for (int lane = 0; lane < kLanes; lane++)
    for (int step = 0; step < 4; step++) std::memcpy(lanes[lane] + 4 * step, &words[step][lane], 4);
#endif
}

// The first and the second numbers of sixteen pairs.
inline void split_pairs(const BFloat16* from, float* first, float* second) {
  uint32_t pairs[kLanes], high[kLanes];
  std::memcpy(pairs, from, sizeof(pairs));
  for (int i = 0; i < kLanes; i++) high[i] = pairs[i] & 0xffff0000u;
  for (int i = 0; i < kLanes; i++) pairs[i] <<= 16;
  std::memcpy(first, pairs, sizeof(pairs));
  std::memcpy(second, high, sizeof(high));
}

// Four steps of a column of keys, of four dimensions each: a lane is a token.
inline void spread_keys(const Bytes (&steps)[4], Vec scale, Lanes* x) {
  for (int step = 0; step < 4; step++, x += 4) {
    alignas(64) uint8_t bytes[64];
    store_bytes(bytes, steps[step]);
    KVIST_UNROLL for (int i = 0; i < 4; i++) store(x[i], bits_of_fours<8>(bytes, 8 * i, 128) * scale);
  }
}

// Four steps of a column of values, of four tokens each: a lane is a dimension.
inline void spread_values(const Bytes (&steps)[4], Vec scale, Lanes* x) {
  alignas(64) uint8_t lanes[kLanes][kLanes];
  transpose_fours(steps, lanes);
  for (int lane = 0; lane < kLanes; lane++) store(x[lane], (byte_numbers(lanes[lane]) - set1(128)) * scale);
}

}  // namespace

Vectors::Vectors(const StreamPlanes& stream, bool keys, int64_t block_size, int64_t dims)
    : stream_(stream), keys_(keys), block_size_(block_size), dims_(dims) {
  if (stream.coded)
    for (const Segment& segment : stream.coded->coding.segments)
      levels_.push_back(make_levels(segment.levels, segment.bits, 128));
}

void Vectors::read(int64_t id, int64_t head, int64_t token, Lanes* x) const {
  if (!stream_.coded) return read_framed(id, token, x);
  const CodedStream& stream = *stream_.coded;
  alignas(64) Lanes framed[kMaxCodedDim];
  read_framed(id, token, framed);
  const bool rotated = !stream.coding.rotation.empty();
  hadamard(framed, stream.coding.rotation);
  const int32_t* order = stream.frame.order + head * dims_;
  const float* mean = stream.frame.mean + head * dims_;
  for (int64_t i = 0; i < dims_; i++)
    store(x[order[i]], load(framed[i]) * set1(rotated ? stream.frame.signs[i] : 1.0f) + set1(mean[order[i]]));
}

void Vectors::enter(int64_t head, Lanes* x) const {
  if (!stream_.coded) return;
  const CodedStream& stream = *stream_.coded;
  alignas(64) Lanes plain[kMaxCodedDim];
  std::memcpy(plain, x, dims_ * sizeof(Lanes));
  const int32_t* order = stream.frame.order + head * dims_;
  for (int64_t i = 0; i < dims_; i++) store(x[i], load(plain[order[i]]));
  rotate(x, stream.coding, stream.frame);
}

template <class T>
void Vectors::read_plane(const T* block, int64_t token, Lanes* x) const {
  constexpr bool kPaired = std::is_same_v<T, BFloat16>;
  const T* from = block + token * dims_;
  if (keys_) {
    for (int64_t i = 0; i < dims_; i += 1 + kPaired) {
      if constexpr (kPaired) split_pairs(from + i * kLanes, x[i], x[i + 1]);
      else store(x[i], load(from + i * kLanes));
    }
    return;
  }
  for (int64_t i = 0; i < dims_; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, dims_ - i);
    alignas(64) float rows[kLanes][kLanes];
    for (int64_t t = 0; t < kLanes; t += 1 + kPaired) {
      if constexpr (kPaired) {
        BFloat16 pairs[2 * kLanes] = {};
        std::memcpy(pairs, from + t * dims_ + 2 * i, 2 * count * sizeof(T));
        split_pairs(pairs, rows[t], rows[t + 1]);
      } else {
        store(rows[t], load_first(from + t * dims_ + i, count));
      }
    }
    alignas(64) Lanes turned[kLanes];
    Lanes* to = count == kLanes ? x + i : turned;
    transpose(rows, to);
    if (count < kLanes) std::memcpy(x + i, turned, count * sizeof(Lanes));
  }
}

void Vectors::read_framed(int64_t id, int64_t token, Lanes* x) const {
  if (!stream_.coded) {
    with_type(stream_.type, [&](auto kind) {
      read_plane(static_cast<const decltype(kind)*>(stream_.plane) + id * block_size_ * dims_, token, x);
    });
    return;
  }
  const Coding& coding = stream_.coded->coding;
  const uint8_t* codes = stream_.coded->codes + id * coding.code_bytes(block_size_);
  for (int64_t index = 0; index < coding.count(); index++) {
    const Segment& segment = coding.segments[index];
    const Float16* scales = stream_.coded->scales + (id * coding.count() + index) * block_size_;
    const Vec read = load(scales + token), scale = fma(read, zero(), read) * set1(1.0f / 128);
    with_bits(segment.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      Bytes steps[4];
      if (keys_) {
        const uint8_t* tile = codes + token / kLanes * coding.code_bytes(kLanes) + coding.bytes_before(index, kLanes);
        for (int64_t chunk = 0; chunk < segment.dims / 16; chunk++) {
          decode_steps<kBits>(tile, segment.dims / 4, chunk, levels_[index], steps);
          spread_keys(steps, scale, x + segment.first + 16 * chunk);
        }
        return;
      }
      const uint8_t* column = codes + coding.bytes_before(index, block_size_);
      for (int64_t i = 0; i < segment.dims; i += kLanes, column += kLanes * kBits * block_size_ / 8) {
        decode_steps<kBits>(column, block_size_ / 4, token / kLanes, levels_[index], steps);
        spread_values(steps, scale, x + segment.first + i);
      }
    });
  }
}

int64_t Vectors::head_bytes() const {
  if (!stream_.coded) return block_size_ * dims_ * (stream_.type == Number::kFloat32 ? 4 : 2);
  const Coding& coding = stream_.coded->coding;
  return coding.code_bytes(block_size_) + coding.count() * block_size_ * static_cast<int64_t>(sizeof(Float16));
}

void Vectors::add_reads(int64_t id, int64_t heads, Reads& reads) const {
  if (!stream_.coded) {
    reads.add(static_cast<const char*>(stream_.plane) + id * head_bytes(), heads * head_bytes());
    return;
  }
  const int64_t codes = stream_.coded->coding.code_bytes(block_size_);
  const int64_t scales = stream_.coded->coding.count() * block_size_;
  reads.add(stream_.coded->codes + id * codes, heads * codes);
  reads.add(stream_.coded->scales + id * scales, heads * scales * static_cast<int64_t>(sizeof(Float16)));
}

}  // namespace kvist
