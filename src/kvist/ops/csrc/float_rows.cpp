#include "float_rows.h"

#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace kvist {
namespace {

constexpr int kTile = 8;          // rows of one vector of outputs whose sums the registers hold
constexpr int kFewRows = 2;       // so few take all vectors of a strip at once, whose sums do not wait for each other
constexpr int64_t kAhead = 4096;  // bytes that are asked for before they are needed

// kColumns vectors of sixteen outputs of a strip, from its vector `first` on, for rows of x.
template <int kBits, int kRows, int kColumns>
void tile(const Packed& w, const uint8_t* strip, int first, const float* x, Vec (&total)[kRows][kColumns]) {
  constexpr int kStep = kBits == 8 ? 4 : 8;  // columns that stand together
  constexpr float kMiddle = kBits == 8 ? 128.0f : 8.0f;
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) total[r][c] = zero();
  for (int64_t g = 0; g < w.groups(); g++, strip += w.group_bytes()) {
    Vec sum[kRows][kColumns];
    KVIST_UNROLL for (int r = 0; r < kRows; r++)
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) sum[r][c] = zero();
    const uint8_t* codes = strip + kStrip * 2 + first * 64;
    const float* columns = x + g * w.group;
    for (int64_t k = 0; k < w.group; k += kStep, codes += kStrip * 4, columns += kStep) {
      if constexpr (kRows <= kFewRows)
        KVIST_UNROLL for (int c = 0; c < kColumns; c++) prefetch(codes + kAhead + c * 64);
      KVIST_UNROLL for (int j = 0; j < kStep; j++) {
        const unsigned bit = 8 * (j % 4) + 4 * (j / 4);
        KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
          const Vec code = bits_of_fours<kBits>(codes + c * 64, bit, kMiddle);
          KVIST_UNROLL for (int r = 0; r < kRows; r++)
            sum[r][c] = fma(code, set1(columns[r * w.width() + j]), sum[r][c]);
        }
      }
    }
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
      const Vec scale = load(reinterpret_cast<const Float16*>(strip) + (first + c) * kLanes);
      KVIST_UNROLL for (int r = 0; r < kRows; r++) total[r][c] = fma(sum[r][c], scale, total[r][c]);
    }
  }
}

template <int kRows, class F>
void by_height(int64_t count, F f) {
  if (count == kRows) return f(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 1) by_height<kRows - 1>(count, f);
}

template <int kBits, int kColumns>
void multiply_strip(const Packed& w, int64_t index, const float* x, int64_t rows, const float* bias, float* out) {
  const uint8_t* strip = w.data + index * w.strip_bytes();
  constexpr int kMost = kColumns == 1 ? kTile : kFewRows;
  for (int first = 0; first < kStrip / kLanes; first += kColumns) {
    for (int64_t row = 0; row < rows; row += kMost) {
      by_height<kMost>(std::min<int64_t>(kMost, rows - row), [&](auto height) {
        constexpr int kRows = decltype(height)::value;
        Vec total[kRows][kColumns];
        tile<kBits, kRows, kColumns>(w, strip, first, x + row * w.width(), total);
        KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
          const int64_t output = index * kStrip + (first + c) * kLanes, left = w.rows - output;
          if (left <= 0) continue;
          KVIST_UNROLL for (int r = 0; r < kRows; r++) {
            const Vec value = bias ? total[r][c] + load_first(bias + output, left) : total[r][c];
            store_first(out + (row + r) * w.rows + output, value, left);
          }
        }
      });
    }
  }
}

template <int kBits>
void multiply_any(const Packed& w, int64_t index, const float* x, int64_t rows, const float* bias, float* out) {
  if (rows <= kFewRows)
    multiply_strip<kBits, kStrip / kLanes>(w, index, x, rows, bias, out);
  else
    multiply_strip<kBits, 1>(w, index, x, rows, bias, out);
}

}  // namespace

void multiply_floats(const Packed& weight, const float* x, int64_t rows, const float* bias, float* out) {
  parallel_for(weight.strips(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++) {
      if (weight.bits == 8)
        multiply_any<8>(weight, strip, x, rows, bias, out);
      else
        multiply_any<4>(weight, strip, x, rows, bias, out);
    }
  });
}

}  // namespace kvist
