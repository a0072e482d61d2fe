// The one micro-kernel: rows of scalars times columns of vectors, both products of attention.
//
// out[row][column] += sum over steps of scalars[row][step] * vectors[column][step], where a column is sixteen numbers.
// Each row's sums run over the steps in order, whatever the other rows and columns are: so one query row has the same
// bits alone (decode) as within a tile (prefill). Callers may cut the steps anywhere; the sums continue from `out`.
#pragma once

#include <algorithm>

#include "planes.h"

namespace kvist {

template <class Plane>
struct Product {
  const typename Plane::Unit* vectors;
  int64_t column_stride, step_stride;
  const typename Plane::Scalar* scalars;
  int64_t scalar_stride;  // from row to row
  float* out;             // columns stand side by side
  int64_t out_stride;     // from row to row
  int64_t rows, columns, steps;
  bool fresh;                           // sums start from zero, not from `out`
  const typename Plane::Unit* upcoming;  // what is wanted after this, in one piece: fetched meanwhile
};

template <class Plane, int kRows, int kColumns, bool kHalf>
inline void product_tile(const Product<Plane>& p, int64_t row, int64_t column) {
  constexpr int64_t kUnits = kLanes * Plane::kPack;  // of a vector
  Vec acc[kRows][kColumns];
  float* out = p.out + row * p.out_stride + column * kLanes;
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++)
      acc[r][c] = p.fresh ? zero() : load(out + r * p.out_stride + c * kLanes);
  const auto* vectors = p.vectors + column * p.column_stride;
  const auto* scalars = p.scalars + row * p.scalar_stride;
  const auto* upcoming = row == 0 ? p.upcoming + column * p.steps * kUnits : nullptr;
  for (int64_t step = 0; step < p.steps; step++, vectors += p.step_stride, scalars++) {
    typename Plane::Operand loaded[kColumns];
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
      const auto* from = vectors + c * p.column_stride;
      loaded[c] = in_register(kHalf ? Plane::load_half(from) : Plane::load(from));
    }
    if (upcoming) {
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) prefetch(upcoming + c * kUnits);
      upcoming += kColumns * kUnits;
    }
    KVIST_UNROLL for (int r = 0; r < kRows; r++) {
      const auto spread = in_register(Plane::spread(scalars[r * p.scalar_stride]));
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) acc[r][c] = Plane::accumulate(acc[r][c], loaded[c], spread);
    }
  }
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) store(out + r * p.out_stride + c * kLanes, acc[r][c]);
}

template <class Plane, int kRows, int kColumns, bool kHalf>
inline void product_rows(const Product<Plane>& p, int64_t count, int64_t row, int64_t column) {
  if (count == kRows) return product_tile<Plane, kRows, kColumns, kHalf>(p, row, column);
  if constexpr (kRows > 1) product_rows<Plane, kRows - 1, kColumns, kHalf>(p, count, row, column);
}

// All rows of one group of columns, in tiles of nearly equal height.
template <class Plane, int kColumns, bool kHalf>
void product_columns(const Product<Plane>& p, int64_t column) {
  for (int64_t row = 0; row < p.rows;) {
    const int64_t left = p.rows - row, tiles = (left + kTileRows - 1) / kTileRows;
    const int64_t count = (left + tiles - 1) / tiles;
    product_rows<Plane, kTileRows, kColumns, kHalf>(p, count, row, column);
    row += count;
  }
}

// `half`: after the columns comes one more of eight numbers, whose other lanes come out as they went in.
template <class Plane>
void multiply(const Product<Plane>& p, bool half) {
  int64_t column = 0;
  if constexpr (kTileColumns == 4)
    for (; column + 4 <= p.columns; column += 4) product_columns<Plane, 4, false>(p, column);
  for (; column + 2 <= p.columns; column += 2) product_columns<Plane, 2, false>(p, column);
  if (column < p.columns) product_columns<Plane, 1, false>(p, column);
  if (half) product_columns<Plane, 1, true>(p, p.columns);
}

// The step after a product over pairs whose last pair is only half visible.
template <class Plane>
Product<FirstOnly<Plane>> last_step(const Product<Plane>& p) {
  return {p.vectors + p.steps * p.step_stride,
          p.column_stride,
          p.step_stride,
          p.scalars + p.steps,
          p.scalar_stride,
          p.out,
          p.out_stride,
          p.rows,
          p.columns,
          1,
          p.fresh && p.steps == 0,
          p.upcoming};
}

}  // namespace kvist
