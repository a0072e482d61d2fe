// Matrix tiles (AMX): sixteen rows of 64 bytes times a column of sixteen steps at once. A column of codes, once it is
// bytes, is such a tile as it lies. For machines without them, or where the system does not lend them, there is nothing.
#pragma once

#include "vec.h"

#if defined(KVIST_AVX512) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#define KVIST_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvist {

#if defined(KVIST_TILES)

// Whether this process may use tiles: Linux asks to be asked, once (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return allowed;
}

// While it lives, all tiles of its thread have sixteen rows of 64 bytes.
class TileScope {
 public:
  TileScope() {
    if (!tiles_allowed()) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (tiles_allowed()) _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

#else

inline bool tiles_allowed() { return false; }

class TileScope {
 public:
  TileScope() {}
  ~TileScope() {}
};

#endif

}  // namespace kvist
