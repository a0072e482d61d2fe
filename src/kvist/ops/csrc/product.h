// The one micro-kernel: rows of scalars times columns of vectors, both products of attention.
//
// out[row][column] += sum over steps of scalars[row][step] * vectors[column][step], where a column is sixteen numbers.
// Each row's sums run over the steps in order, whatever the other rows and columns are: so one query row has the same
// bits alone (decode) as within a tile (prefill). Callers may cut the steps anywhere; the sums continue from `out`.
#pragma once

#include <algorithm>

#include "fetch.h"
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
  bool fresh;  // sums start from zero, not from `out`
  Fetcher* fetcher;  // paced by the caller
};

// Ticks of the fetcher, nearly: one whenever a vector is loaded, for each tile of rows.
inline int64_t ticks(int64_t rows, int64_t vectors) { return (rows + kTileMaxRows - 1) / kTileMaxRows * vectors; }

template <class Plane, int kRows, int kColumns, bool kHalf>
inline void product_tile(const Product<Plane>& p, int64_t row, int64_t column) {
  Vec acc[kRows][kColumns];
  float* out = p.out + row * p.out_stride + column * kLanes;
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++)
      acc[r][c] = p.fresh ? zero() : load(out + r * p.out_stride + c * kLanes);
  const auto* vectors = p.vectors + column * p.column_stride;
  const auto* scalars = p.scalars + row * p.scalar_stride;
  for (int64_t step = 0; step < p.steps; step++, vectors += p.step_stride, scalars++) {
    typename Plane::Operand loaded[kColumns];
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) {
      const auto* from = vectors + c * p.column_stride;
      loaded[c] = in_register(kHalf ? Plane::load_half(from) : Plane::load(from));
      p.fetcher->tick();
    }
    KVIST_UNROLL for (int r = 0; r < kRows; r++) {
      const auto spread = in_register(Plane::spread(scalars[r * p.scalar_stride]));
      KVIST_UNROLL for (int c = 0; c < kColumns; c++) acc[r][c] = Plane::accumulate(acc[r][c], loaded[c], spread);
    }
  }
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kColumns; c++) store(out + r * p.out_stride + c * kLanes, acc[r][c]);
}

// One tile of rows, over columns [column, end).
template <class Plane, int kRows, int kColumns, bool kHalf>
void product_strip(const Product<Plane>& p, int64_t count, int64_t row, int64_t column, int64_t end) {
  if (count == kRows) {
    for (; column < end; column += kColumns) product_tile<Plane, kRows, kColumns, kHalf>(p, row, column);
    return;
  }
  if constexpr (kRows > 1) product_strip<Plane, kRows - 1, kColumns, kHalf>(p, count, row, column, end);
}

template <class Plane>
bool few_rows(const Product<Plane>& p) {
  return p.rows <= kTileMaxRows;
}

// As many groups of kColumns as there are before column `end`, for all rows, in tiles of nearly equal height. Returns
// the column after them. One tile of rows goes through all columns; several go through each group, which stays cached.
template <class Plane, int kColumns, bool kHalf>
int64_t product_columns(const Product<Plane>& p, int64_t column, int64_t end) {
  constexpr int64_t kRows = std::min(kTileMaxRows, kTileVectors / kColumns);
  end -= (end - column) % kColumns;
  if (p.rows <= kRows) {
    product_strip<Plane, kRows, kColumns, kHalf>(p, p.rows, 0, column, end);
    return end;
  }
  for (; column < end; column += kColumns) {
    for (int64_t row = 0; row < p.rows;) {
      const int64_t left = p.rows - row, tiles = (left + kRows - 1) / kRows, count = (left + tiles - 1) / tiles;
      product_strip<Plane, kRows, kColumns, kHalf>(p, count, row, column, column + kColumns);
      row += count;
    }
  }
  return end;
}

// `half`: after the columns comes one more of eight numbers, whose other lanes of `out` are left undefined.
//
// Tiles are chosen for the way memory is read. Few rows (decode) finish before the vectors arrive, and those arrive
// fastest when they are read in the order in which they lie: keys one column at a time, values in whole rows. Many
// rows (prefill) want the tile with the fewest loads per product.
template <class Plane>
void multiply(const Product<Plane>& p, bool half) {
  const bool steps_adjoin = p.step_stride < p.column_stride;
  int64_t column = 0;
  if (!few_rows(p) || !steps_adjoin) {
    if constexpr (kTileVectors >= 8) {
      if (few_rows(p)) column = product_columns<Plane, 8, false>(p, column, p.columns);
      column = product_columns<Plane, 4, false>(p, column, p.columns);
    }
    column = product_columns<Plane, 2, false>(p, column, p.columns);
  }
  column = product_columns<Plane, 1, false>(p, column, p.columns);
  if (half) product_columns<Plane, 1, true>(p, column, column + 1);
}

// One step of a product, of whose pairs only one half is visible.
template <template <class> class Half, class Plane>
Product<Half<Plane>> one_step(const Product<Plane>& p, int64_t step) {
  return {p.vectors + step * p.step_stride,
          p.column_stride,
          p.step_stride,
          p.scalars + step,
          p.scalar_stride,
          p.out,
          p.out_stride,
          p.rows,
          p.columns,
          1,
          p.fresh && step == 0,
          p.fetcher};
}

}  // namespace kvist
