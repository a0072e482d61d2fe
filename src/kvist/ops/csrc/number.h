// The types of numbers that tensors hold, and calling a function with one of them.
#pragma once

#include <cstdint>

namespace kvist {

enum class Number { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// f(T{}) with the T that `type` names.
template <class F>
inline void with_type(Number type, F f) {
  switch (type) {
    case Number::kFloat32: return f(float{});
    case Number::kBFloat16: return f(BFloat16{});
    case Number::kFloat16: return f(Float16{});
  }
}

}  // namespace kvist
