#include "frame.h"

#include <cmath>

namespace kvist {
namespace {

void flip_signs(Lanes* x, const Coding& coding, const Frame& frame) {
  for (int64_t i = 0; i < coding.dim; i++) store(x[i], load(x[i]) * set1(frame.signs[i]));
}

}  // namespace

void hadamard(Lanes* x, const std::vector<int64_t>& blocks) {
  for (const int64_t size : blocks) {
    for (int64_t half = 1; half < size; half *= 2) {
      for (int64_t begin = 0; begin < size; begin += 2 * half) {
        for (int64_t i = begin; i < begin + half; i++) {
          const Vec low = load(x[i]), high = load(x[i + half]);
          store(x[i], low + high);
          store(x[i + half], low - high);
        }
      }
    }
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
