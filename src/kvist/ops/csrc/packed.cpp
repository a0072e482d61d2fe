#include "packed.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "bytes.h"
#include "gates.h"
#include "parallel.h"

namespace kvist {
namespace {

constexpr int kVectors = kStrip / kLanes;  // of outputs in a strip
// Sums that the registers hold: rows of a tile times its vectors. With 4 bits the codes take registers, too.
constexpr int kTileRows = kSumVectors >= 24 ? 6 : 4;
constexpr int kTileVectors8 = kSumVectors >= 24 ? 4 : 1;
constexpr int kTileVectors4 = kSumVectors >= 24 ? 2 : 1;
// So few rows wait for the codes, which arrive fastest when they are read as they lie: all vectors of a strip at once.
constexpr int64_t kFewRows = 2;
constexpr int64_t kAhead = 4096;  // bytes that are asked for before they are needed

// f with the number of a strip's vectors that a tile takes at once.
template <class F>
void by_width(int64_t bits, int64_t rows, F f) {
  using std::integral_constant;
  const auto wide = [&](auto bits, auto vectors) {
    rows <= kFewRows ? f(bits, integral_constant<int, kVectors>{}) : f(bits, vectors);
  };
  if (bits == 8) return wide(integral_constant<int, 8>{}, integral_constant<int, kTileVectors8>{});
  wide(integral_constant<int, 4>{}, integral_constant<int, kTileVectors4>{});
}

// Half floats of a group's scales, sixteen outputs.
inline Vec scales_of(const uint8_t* group, int vector) {
  return load(reinterpret_cast<const Float16*>(group) + vector * kLanes);
}

// One tile: the rows from `row` on, the vectors of outputs from `first` on, all columns.
template <int kBits, int kRows, int kColumns>
inline void tile(const Packed& w, const uint8_t* strip, int first, const Coded& x, int64_t row,
                 Vec (&total)[kRows][kColumns]) {
  constexpr int kOffset = kBits == 8 ? kByteOffset : 8;
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) total[r][c] = zero();
  const int64_t groups = x.groups, group_bytes = w.group_bytes();
  const float* scales = x.scales.get() + row * groups;
  const int32_t* sums = x.sums.get() + row * groups;
  for (int64_t g = 0; g < groups; g++, strip += group_bytes) {
    Ints sum[kRows][kColumns];
    KVIST_UNROLL for (int r = 0; r < kRows; r++)
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) sum[r][c] = set1_int(0);
    const uint8_t* codes = strip + kStrip * 2 + first * 64;
    const uint8_t* rows = reinterpret_cast<const uint8_t*>(x.codes.get()) + row * x.width + g * w.group;
    constexpr int kStep = kBits == 8 ? 4 : 8;  // columns
    for (int64_t k = 0; k < w.group; k += kStep, codes += kStrip * 4) {
      Bytes low[kColumns], high[kColumns];
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
        if constexpr (kRows <= kFewRows) prefetch(codes + kAhead + c * 64);
        if constexpr (kBits == 8) {
          low[c] = in_register(with_offset(load_bytes(codes + c * 64)));
        } else {
          const Bytes both = load_bytes(codes + c * 64);
          low[c] = in_register(low_nibbles(both));
          high[c] = in_register(high_nibbles(both));
        }
      }
      KVIST_UNROLL for (int r = 0; r < kRows; r++) {
        const Bytes four = in_register(spread_bytes(rows + r * x.width + k));
        if constexpr (kBits == 8) {
          KVIST_UNROLL for (int c = 0; c < kColumns; c++) sum[r][c] = dot_bytes(sum[r][c], low[c], four);
        } else {
          const Bytes next = in_register(spread_bytes(rows + r * x.width + k + 4));
          KVIST_UNROLL for (int c = 0; c < kColumns; c++)
            sum[r][c] = dot_nibbles(sum[r][c], low[c], high[c], four, next);
        }
      }
    }
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
      const Vec scale = scales_of(strip, first + c);
      KVIST_UNROLL for (int r = 0; r < kRows; r++) {
        const Ints exact = add(sum[r][c], set1_int(-kOffset * sums[r * groups + g]));
        total[r][c] = fma(to_float(exact) * set1(scales[r * groups + g]), scale, total[r][c]);
      }
    }
  }
}

// Tiles of nearly equal height over all rows: f(row, std::integral_constant<int, height>).
template <int kRows, class F>
void by_height(int64_t row, int64_t count, F f) {
  if (count == kRows) return f(row, std::integral_constant<int, kRows>{});
  if constexpr (kRows > 1) by_height<kRows - 1>(row, count, f);
}
template <class F>
void in_tiles(int64_t rows, F f) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, tiles = (left + kTileRows - 1) / kTileRows, count = (left + tiles - 1) / tiles;
    by_height<kTileRows>(row, count, f);
    row += count;
  }
}

template <int kBits, int kColumns>
void multiply_strip(const Packed& w, int64_t index, const Coded& x, int64_t rows, const Finish& finish) {
  const uint8_t* strip = w.data + index * w.strip_bytes();
  const int64_t outputs = w.outputs();
  for (int first = 0; first < kVectors; first += kColumns) {
    if (index * kStrip + first * kLanes >= outputs) break;
    in_tiles(rows, [&](int64_t row, auto height) {
      constexpr int kRows = decltype(height)::value;
      Vec total[kRows][kColumns];
      tile<kBits, kRows, kColumns>(w, strip, first, x, row, total);
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
        const int64_t output = index * kStrip + (first + c) * kLanes, left = outputs - output;
        if (left <= 0) continue;
        KVIST_UNROLL for (int r = 0; r < kRows; r++) {
          const int64_t place = (row + r) * finish.stride + output;
          Vec value = total[r][c];
          if (finish.bias) value = value + load_first(finish.bias + output, left);
          if (finish.residual) value = load_first(finish.residual + place, left) + value;
          store_first(finish.out + place, value, left);
        }
      }
    });
  }
}

inline Vec gate_of(Vec x, Gate gate) { return gate == Gate::kSilu ? silu(x) : gelu_tanh(x); }

// The gated outputs of one strip [rows, 32], into `out` with rows `stride` apart.
template <int kBits, int kColumns>
void gate_strip(const Packed& w, int64_t index, const Coded& x, int64_t rows, Gate gate, float* out, int64_t stride) {
  const uint8_t* strip = w.data + index * w.strip_bytes();
  constexpr int kHalf = kVectors / 2;
  in_tiles(rows, [&](int64_t row, auto height) {
    constexpr int kRows = decltype(height)::value;
    Vec total[kRows][kVectors];
    for (int first = 0; first < kVectors; first += kColumns) {
      Vec part[kRows][kColumns];
      tile<kBits, kRows, kColumns>(w, strip, first, x, row, part);
      KVIST_UNROLL for (int r = 0; r < kRows; r++)
        KVIST_UNROLL for (int c = 0; c < kColumns; c++) total[r][first + c] = part[r][c];
    }
    KVIST_UNROLL for (int r = 0; r < kRows; r++)
      KVIST_UNROLL for (int c = 0; c < kHalf; c++)
        store(out + (row + r) * stride + c * kLanes, gate_of(total[r][c], gate) * total[r][kHalf + c]);
  });
}

}  // namespace

void code_row(const float* x, int64_t columns, int64_t group, int64_t first_group, int64_t row, const Coded& coded) {
  int8_t* codes = coded.codes.get() + row * coded.width + first_group * group;
  for (int64_t start = 0, g = row * coded.groups + first_group; start < columns; start += group, g++) {
    const int64_t count = std::min(group, columns - start);
    Vec most = zero(), poison = zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec numbers = load_first(x + start + i, count - i);
      most = larger(absolute(numbers), most);
      poison = fma(numbers, zero(), poison);  // NaN where a number is not finite
    }
    const float peak = maximum(most), bad = sum(poison);
    const Vec inverse = set1(peak > 0 ? 127.0f / peak : 0.0f);
    Ints total = set1_int(0);
    for (int64_t i = 0; i < group; i += kLanes) {
      // Columns that only fill up the last group are zeros, as are the weights that they meet.
      const Vec numbers = i < count ? load_first(x + start + i, count - i) : zero();
      const Ints whole = to_ints(numbers * inverse);
      store_low_bytes(reinterpret_cast<uint8_t*>(codes + start + i), whole);
      total = add(total, whole);
    }
    int32_t lanes[kLanes];
    store_ints(lanes, total);
    coded.sums[g] = 0;
    for (int32_t lane : lanes) coded.sums[g] += lane;
    coded.scales[g] = peak / 127.0f + bad;
  }
}

void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
  Vec squares[2] = {zero(), zero()};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec numbers = load_first(x + i, size - i);
    squares[i / kLanes % 2] = fma(numbers, numbers, squares[i / kLanes % 2]);
  }
  const float mean = sum(squares[0] + squares[1]) / static_cast<float>(size);
  const Vec inverse = set1(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < size; i += kLanes)
    store_first(out + i, load_first(x + i, size - i) * inverse * load_first(weight + i, size - i), size - i);
}

void multiply(const Packed& weight, const Coded& x, int64_t rows, const Finish& finish) {
  parallel_for(weight.strips(), 1, [&](int64_t begin, int64_t end) {
    by_width(weight.bits, rows, [&](auto bits, auto columns) {
      for (int64_t strip = begin; strip < end; strip++)
        multiply_strip<decltype(bits)::value, decltype(columns)::value>(weight, strip, x, rows, finish);
    });
  });
}

void multiply_gated(const Packed& weight, const Coded& x, int64_t rows, Gate gate, int64_t next_group,
                    const Coded& out) {
  // A thread does whole groups of the next product's columns, and makes them whole numbers at once.
  const int64_t outputs = weight.outputs(), half = weight.strip_outputs(), groups = out.groups;
  const int64_t padded = (next_group + half - 1) / half * half;
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> gated = make_buffer<float>(rows * padded);
    for (int64_t g = begin; g < end; g++) {
      const int64_t first = g * next_group, last = std::min(first + next_group, outputs);
      for (int64_t strip = first / half; strip * half < last; strip++) {
        float* to = gated.get() + strip * half - first;
        by_width(weight.bits, rows, [&](auto bits, auto columns) {
          gate_strip<decltype(bits)::value, decltype(columns)::value>(weight, strip, x, rows, gate, to, padded);
        });
      }
      for (int64_t row = 0; row < rows; row++)
        code_row(gated.get() + row * padded, last - first, next_group, g, row, out);
    }
  });
}

void unpack_row(const Packed& weight, int64_t index, float* out) {
  const uint8_t* strip = weight.data + index / kStrip * weight.strip_bytes();
  const int64_t lane = index % kStrip, step = weight.bits == 8 ? 4 : 8;
  for (int64_t g = 0; g < weight.groups(); g++, strip += weight.group_bytes()) {
    float scale[kLanes];
    store(scale, scales_of(strip, static_cast<int>(lane / kLanes)));
    const uint8_t* codes = strip + kStrip * 2 + lane * 4;
    const int64_t first = g * weight.group, count = std::min(weight.group, weight.columns - first);
    for (int64_t k = 0; k < count; k++) {
      const uint8_t byte = codes[k / step * kStrip * 4 + k % 4];
      const int code = weight.bits == 8 ? byte - 128 : (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
      out[first + k] = static_cast<float>(code) * scale[lane % kLanes];
    }
  }
}

}  // namespace kvist
