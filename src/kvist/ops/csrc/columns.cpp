#include "columns.h"

#include <algorithm>

#include "tiles.h"

namespace kvist {
namespace {

constexpr int kDecoded = 0;  // instead of bits: codes that stand in memory as the bytes they become

template <int kBits>
inline void load_steps(const Columns& p, const uint8_t* column, int64_t chunk, Bytes (&out)[4]) {
  if constexpr (kBits == kDecoded) {
    KVIST_UNROLL for (int i = 0; i < 4; i++) out[i] = load_bytes(column + 256 * chunk + 64 * i);
  } else {
    decode_steps<kBits>(column, p.steps, chunk, *p.levels, out);
  }
}

template <int kBits, int kRows, int kCount>
inline void sum_tile(const Columns& p, Fetcher& fetcher, int64_t row, int64_t column) {
  Ints acc[kRows][kCount];
  int32_t* out = p.out + row * p.out_stride + column * kLanes;
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kCount; c++)
      acc[r][c] = p.start ? set1_int(p.start[row + r]) : load_ints(out + r * p.out_stride + c * kLanes);
  const uint8_t* codes = p.codes + column * p.column_bytes;
  const uint8_t* scalars = p.scalars + row * p.scalar_stride;
  for (int64_t chunk = 0; chunk < p.steps / 4; chunk++, scalars += 16) {
    Bytes decoded[kCount][4];
    KVIST_UNROLL for (int c = 0; c < kCount; c++)
      load_steps<kBits>(p, codes + c * p.column_bytes, chunk, decoded[c]);
    KVIST_UNROLL for (int i = 0; i < 4; i++) {
      if constexpr (kBits != kDecoded) {
        for (int64_t t = ticks(kCount, i); t < ticks(kCount, i + 1); t++) fetcher.tick();
      }
      KVIST_UNROLL for (int r = 0; r < kRows; r++) {
        const Bytes spread = spread_bytes(scalars + r * p.scalar_stride + 4 * i);
        KVIST_UNROLL for (int c = 0; c < kCount; c++)
          acc[r][c] = dot_bytes(acc[r][c], decoded[c][i], spread);
      }
    }
  }
  KVIST_UNROLL for (int r = 0; r < kRows; r++)
    KVIST_UNROLL for (int c = 0; c < kCount; c++) store_ints(out + r * p.out_stride + c * kLanes, acc[r][c]);
}

// One tile of rows, over columns [column, end), for a count that is a multiple of kStep.
template <int kBits, int kRows, int kStep, int kCount>
void sum_strip(const Columns& p, Fetcher& fetcher, int64_t count, int64_t row, int64_t column, int64_t end) {
  if (count == kRows) {
    for (; column < end; column += kCount) sum_tile<kBits, kRows, kCount>(p, fetcher, row, column);
    return;
  }
  if constexpr (kRows > kStep) sum_strip<kBits, kRows - kStep, kStep, kCount>(p, fetcher, count, row, column, end);
}

// All rows in tiles of nearly equal height, at most kRows, over as many groups of kCount columns as there are. Returns
// the column after them.
template <int kBits, int kRows, int kStep, int kCount>
int64_t sum_rows(const Columns& p, Fetcher& fetcher, int64_t column) {
  const int64_t end = p.columns - (p.columns - column) % kCount;
  if (column == end) return end;
  for (int64_t row = 0; row < p.rows;) {
    const int64_t left = (p.rows - row) / kStep, most = kRows / kStep, tiles = (left + most - 1) / most;
    const int64_t count = (left + tiles - 1) / tiles * kStep;
    sum_strip<kBits, kRows, kStep, kCount>(p, fetcher, count, row, column, end);
    row += count;
  }
  return end;
}

// Codes are decoded again for each tile of rows. Several columns at once hide each other's latency, as long as the
// registers hold their sums.
template <int kBits, int kStep>
void sum_few(const Columns& p, Fetcher& fetcher) {
  constexpr int kMost = kFewRows * kStep;
  if constexpr (kSumVectors < 16) {
    sum_rows<kBits, kSumVectors, kStep, 1>(p, fetcher, 0);
    return;
  }
  constexpr int kByFour = std::min<int>(kMost, kSumVectors / 5 / kStep * kStep);
  constexpr int kByTwo = std::max(kStep, std::min<int>(kMost, kSumVectors * 5 / 12 / kStep * kStep));
  int64_t column = 0;
  if constexpr (kByFour > 0) {
    if (p.rows <= kByFour) column = sum_rows<kBits, kByFour, kStep, 4>(p, fetcher, 0);
  }
  column = sum_rows<kBits, kByTwo, kStep, 2>(p, fetcher, column);
  sum_rows<kBits, kByTwo, kStep, 1>(p, fetcher, column);
}

void sum_many(const Columns& p, Fetcher& fetcher) {
  int64_t column = 0;
  if constexpr (kSumVectors >= 16) column = sum_rows<kDecoded, kSumVectors / 4, 1, 4>(p, fetcher, column);
  column = sum_rows<kDecoded, std::min(8, kSumVectors / 2), 1, 2>(p, fetcher, column);
  sum_rows<kDecoded, std::min(8, kSumVectors), 1, 1>(p, fetcher, column);
}

// While four steps of one column are decoded.
inline void fetch(Fetcher& fetcher, int64_t column) {
  for (int64_t t = ticks(column, 4); t < ticks(column + 1, 4); t++) fetcher.tick();
}

// Each column is filled up with zeros to `steps`.
template <int kBits>
void decode_columns(const Columns& p, Fetcher& fetcher, int64_t steps, uint8_t* to) {
  for (int64_t column = 0; column < p.columns; column++) {
    for (int64_t chunk = 0; chunk < p.steps / 4; chunk++) {
      Bytes decoded[4];
      fetch(fetcher, column);
      load_steps<kBits>(p, p.codes + column * p.column_bytes, chunk, decoded);
      for (int i = 0; i < 4; i++, to += 64) store_bytes(to, decoded[i]);
    }
    for (int64_t step = p.steps; step < steps; step++, to += 64) store_bytes(to, set1_int(0));
  }
}

#if defined(KVIST_TILES)
constexpr int64_t kTileSteps = 16;
constexpr int64_t kTilesFrom = 12;  // rows; for fewer the way into tiles and back takes longer than what it saves

// One product of tiles for each of up to four columns.
template <int kCount>
void sum_tiles(const Columns& p, const uint8_t* decoded, int64_t chunks, int64_t row) {
  const int64_t column_bytes = chunks * kTileSteps * 64;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const uint8_t* column = decoded + chunk * kTileSteps * 64;
    _tile_loadd(4, p.scalars + row * p.scalar_stride + chunk * 64, p.scalar_stride);
    _tile_loadd(5, column, 64);
    _tile_dpbsud(0, 4, 5);
    if constexpr (kCount > 1) {
      _tile_loadd(6, column + column_bytes, 64);
      _tile_dpbsud(1, 4, 6);
    }
    if constexpr (kCount > 2) {
      _tile_loadd(5, column + 2 * column_bytes, 64);
      _tile_dpbsud(2, 4, 5);
    }
    if constexpr (kCount > 3) {
      _tile_loadd(6, column + 3 * column_bytes, 64);
      _tile_dpbsud(3, 4, 6);
    }
  }
  alignas(64) int32_t sums[kTileRows][kCount * kLanes];
  _tile_stored(0, sums[0], sizeof(sums[0]));
  if constexpr (kCount > 1) _tile_stored(1, sums[0] + kLanes, sizeof(sums[0]));
  if constexpr (kCount > 2) _tile_stored(2, sums[0] + 2 * kLanes, sizeof(sums[0]));
  if constexpr (kCount > 3) _tile_stored(3, sums[0] + 3 * kLanes, sizeof(sums[0]));
  asm volatile("" ::: "memory");  // the compiler does not know that storing a tile writes memory
  for (int64_t r = 0; r < std::min(kTileRows, p.rows - row); r++) {
    int32_t* out = p.out + (row + r) * p.out_stride;
    KVIST_UNROLL for (int c = 0; c < kCount; c++) {
      const Ints before = p.start ? set1_int(p.start[row + r]) : load_ints(out + c * kLanes);
      store_ints(out + c * kLanes, add(before, load_ints(sums[r] + c * kLanes)));
    }
  }
}

// What a tile holds beyond the rows and the steps that there are comes out in rows that nobody reads, or is multiplied
// by zeros.
void multiply_tiles(const Columns& p, Fetcher& fetcher) {
  alignas(64) uint8_t decoded[kColumns * kMaxSteps * 64];
  const int64_t chunks = (p.steps + kTileSteps - 1) / kTileSteps;
  with_bits(p.bits,
            [&](auto bits) { decode_columns<decltype(bits)::value>(p, fetcher, chunks * kTileSteps, decoded); });
  asm volatile("" ::: "memory");  // the compiler does not know that loading a tile reads memory
  for (int64_t row = 0; row < p.rows; row += kTileRows) {
    switch (p.columns) {
      case 1: sum_tiles<1>(p, decoded, chunks, row); break;
      case 2: sum_tiles<2>(p, decoded, chunks, row); break;
      case 3: sum_tiles<3>(p, decoded, chunks, row); break;
      default: sum_tiles<4>(p, decoded, chunks, row);
    }
  }
}
#endif

}  // namespace

void multiply(const Columns& p, Fetcher& fetcher) {
#if defined(KVIST_TILES)
  if (p.rows >= kTilesFrom && tiles_allowed()) return multiply_tiles(p, fetcher);
#endif
  if (p.rows <= kFewRows * p.digits) {
    with_bits(p.bits, [&](auto bits) {
      p.digits == 1 ? sum_few<decltype(bits)::value, 1>(p, fetcher) : sum_few<decltype(bits)::value, 2>(p, fetcher);
    });
    return;
  }
  alignas(64) uint8_t decoded[kColumns * kMaxSteps * 64];
  with_bits(p.bits, [&](auto bits) { decode_columns<decltype(bits)::value>(p, fetcher, p.steps, decoded); });
  Columns bytes = p;
  bytes.codes = decoded;
  bytes.column_bytes = 64 * p.steps;
  sum_many(bytes, fetcher);
}

}  // namespace kvist
