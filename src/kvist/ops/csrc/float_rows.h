// Products of packed weights with rows that stay floating-point numbers.
#pragma once

#include "packed.h"

namespace kvist {

// out[row] = weight * x[row] + bias, products and sums in float32, column after column within a group and group after
// group, so that a row's bits depend on it and on the weight alone. `x`: rows of weight.width() numbers, zeros behind
// the weight's columns. The weight is not paired.
void multiply_floats(const Packed& weight, const float* x, int64_t rows, const float* bias, float* out);

}  // namespace kvist
