#include "frame.h"

#include <cmath>

namespace kvist {
namespace {

void flip_signs(Lanes* x, const Coding& coding, const Frame& frame) {
  for (int64_t i = 0; i < coding.dim; i++) store(x[i], load(x[i]) * set1(frame.signs[i]));
}

// kLevels levels of butterflies, from that of distance `half` on, in one pass over memory.
template <int kLevels>
void butterflies(Lanes* x, int64_t size, int64_t half) {
  constexpr int kCount = 1 << kLevels;
  for (int64_t begin = 0; begin < size; begin += kCount * half) {
    for (int64_t i = begin; i < begin + half; i++) {
      Vec part[kCount];
      KVIST_UNROLL for (int k = 0; k < kCount; k++) part[k] = load(x[i + k * half]);
      KVIST_UNROLL for (int level = 1; level < kCount; level *= 2) {
        KVIST_UNROLL for (int k = 0; k < kCount; k++) {
          if (k & level) continue;
          const Vec low = part[k], high = part[k + level];
          part[k] = low + high;
          part[k + level] = low - high;
        }
      }
      KVIST_UNROLL for (int k = 0; k < kCount; k++) store(x[i + k * half], part[k]);
    }
  }
}

}  // namespace

void hadamard(Lanes* x, const std::vector<int64_t>& blocks) {
  for (const int64_t size : blocks) {
    int64_t half = 1;
    for (; half * 8 <= size; half *= 8) butterflies<3>(x, size, half);
    if (half * 4 <= size) butterflies<2>(x, size, half);
    else if (half * 2 <= size) butterflies<1>(x, size, half);
    const Vec norm = set1(static_cast<float>(1 / std::sqrt(static_cast<double>(size))));
    for (int64_t i = 0; i < size; i++) store(x[i], load(x[i]) * norm);
    x += size;
  }
}

void rotate(Lanes* x, const Coding& coding, const Frame& frame) {
  if (coding.rotation.empty()) return;
  flip_signs(x, coding, frame);
  hadamard(x, coding.rotation);
}

void rotate_back(Lanes* x, const Coding& coding, const Frame& frame) {
  if (coding.rotation.empty()) return;
  hadamard(x, coding.rotation);
  flip_signs(x, coding, frame);
}

}  // namespace kvist
