// The one micro-kernel over codes: rows of bytes times columns of codes, both products of attention, in whole numbers.
//
// out[row][column] = sum over steps of scalars[row][step] * column[step], four bytes by four at a time. Sums of whole
// numbers are exact, so tiles are chosen for speed alone. Codes stand for their levels plus kByteOffset, and scalars
// are signed; `start` makes up for the offset.
//
// A tile of a matrix unit (tiles.h) has sixteen rows, whether or not there are as many: sixteen rows of scalars must be
// readable from each multiple of sixteen on, and 64 bytes beyond.
#pragma once

#include "bytes.h"
#include "coding.h"
#include "fetch.h"

namespace kvist {

constexpr int64_t kColumns = 4;  // at a time, of sixteen numbers each
constexpr int64_t kTileRows = 16;
constexpr int64_t kMaxSteps = kMaxCodedDim / 4;  // of four codes, in a column
constexpr int64_t kFewRows = 8;  // of queries; for these codes are decoded in registers, else once into memory

struct Columns {
  const uint8_t* codes;
  int64_t column_bytes;
  int64_t columns;  // at most kColumns
  int64_t steps;    // of four codes, a multiple of four, at most kMaxSteps
  int64_t bits;
  const Levels* levels;
  const uint8_t* scalars;  // bytes; a row's steps stand side by side
  int64_t scalar_stride;   // from row to row
  int64_t rows;
  int64_t digits;        // rows of the same query side by side: 1 or 2
  const int32_t* start;  // what each row's sums begin with; null to go on from `out`
  int32_t* out;
  int64_t out_stride;  // from row to row
};

// Ticks of the fetcher while so many steps of so many columns are worked on.
constexpr int64_t ticks(int64_t columns, int64_t steps) { return columns * steps * 3 / 8; }

void multiply(const Columns& columns, Fetcher& fetcher);

// f(i) for each column, unrolled where there are as many as usual.
template <class F>
inline void each_column(int64_t columns, F f) {
  if (columns == kColumns) {
    KVIST_UNROLL for (int64_t i = 0; i < kColumns; i++) f(i);
  } else {
    for (int64_t i = 0; i < columns; i++) f(i);
  }
}

// The sums of one row in column i, of which there are as many, `stride` apart, as its query or weights have digits.
template <int kDigits>
inline Vec whole_sum(const int32_t* sums, int64_t stride, int64_t i) {
  const Vec high = to_float(load_ints(sums + i * kLanes));
  if constexpr (kDigits == 1) return high;
  return fma(high, set1(256), to_float(load_ints(sums + stride + i * kLanes)));
}

}  // namespace kvist
