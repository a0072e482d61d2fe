// Each number's result depends on it alone, not on its place: the last few go through the same sixteen lanes.
#include "elementwise.h"

#include <algorithm>

#include "gates.h"
#include "parallel.h"

namespace kvist {
namespace {

constexpr int64_t kGrain = 1 << 14;  // numbers that pay for waking one more thread

}  // namespace

void silu_mul(Number type, const void* gate_up, void* out, int64_t rows, int64_t width) {
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    const T* from = static_cast<const T*>(gate_up);
    T* to = static_cast<T*>(out);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T *gate = from + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += kLanes)
          store_first(to + row * width + i, silu(load_first(gate + i, width - i)) * load_first(up + i, width - i),
                      width - i);
      }
    });
  });
}

void gelu(Number type, const void* x, void* out, int64_t count, bool tanh) {
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
      const T* from = static_cast<const T*>(x) + begin;
      T* to = static_cast<T*>(out) + begin;
      for (int64_t i = 0; i < end - begin; i += kLanes) {
        const Vec number = load_first(from + i, end - begin - i);
        store_first(to + i, tanh ? gelu_tanh(number) : gelu_exact(number), end - begin - i);
      }
    });
  });
}

}  // namespace kvist
