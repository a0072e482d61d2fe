// Keys and values as numbers of 16 or 32 bits. product.h says how a row's sums are ordered.
#pragma once

#include <memory>

#include "attention.h"

namespace kvist {

std::unique_ptr<Keys> dense_keys(const Batch& batch, const void* plane, Number type);
std::unique_ptr<Values> dense_values(const Batch& batch, const void* plane, Number type);

}  // namespace kvist
