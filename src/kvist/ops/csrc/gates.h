// The activations of the MLPs, sixteen numbers at a time.
#pragma once

#include "vec.h"

namespace kvist {

inline Vec silu(Vec x) { return x / (set1(1.0f) + exp(zero() - x)); }

// 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3); arXiv 1606.08415.
inline Vec gelu_tanh(Vec x) {
  const Vec u = set1(0.797884561f) * fma(set1(0.044715f), x * x * x, x);
  return x / (set1(1.0f) + exp(set1(-2.0f) * u));
}

// 0.5 x (1 + erf(x / sqrt 2)) = 0.5 x erfc(-x / sqrt 2), and erfc(-a) = 2 - erfc(a).
inline Vec gelu_exact(Vec x) {
  const Vec tail = erfc_positive(absolute(x) * set1(0.707106781f));
  return set1(0.5f) * x * by_sign(x, tail, set1(2.0f) - tail);
}

}  // namespace kvist
