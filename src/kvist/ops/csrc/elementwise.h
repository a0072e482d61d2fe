// Operators that touch each number once, as plain pointers.
#pragma once

#include <cstdint>

#include "number.h"

namespace kvist {

// gate_up [rows, 2 * width] to silu(gate) * up [rows, width], of one type.
void silu_mul(Number type, const void* gate_up, void* out, int64_t rows, int64_t width);

// GELU of `count` numbers, exact or in its tanh form.
void gelu(Number type, const void* x, void* out, int64_t count, bool tanh);

}  // namespace kvist
