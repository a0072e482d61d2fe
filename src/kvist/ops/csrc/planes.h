// How the numbers of a plane enter a product, per plane dtype.
//
// A plane holds vectors: sixteen numbers, or sixteen pairs of bf16. The other operand of a product is a scalar: a query
// number or a softmax weight in float, or a pair of them in bf16. `accumulate` does one step of sixteen dot products.
#pragma once

#include "vec.h"

namespace kvist {

struct Float32Plane {
  using Unit = float;
  using Scalar = float;
  using Operand = Vec;
  static constexpr int kPack = 1;  // numbers of one dot product that a scalar holds

  static Operand load(const Unit* from) { return kvist::load(from); }
  static Operand load_half(const Unit* from) { return kvist::load_half(from); }
  static Operand spread(Scalar x) { return set1(x); }
  static Vec accumulate(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
  static void store_scalars(Scalar* to, Vec x) { store(to, x); }  // sixteen numbers as scalars
};

struct Float16Plane : Float32Plane {
  using Unit = Float16;
  static Operand load(const Unit* from) { return kvist::load(from); }
  static Operand load_half(const Unit* from) { return kvist::load_half(from); }
};

struct BFloat16Plane {
  using Unit = BFloat16;
  using Scalar = uint32_t;
  using Operand = Pairs;
  static constexpr int kPack = 2;

  static Operand load(const Unit* from) { return load_pairs(from); }
  static Operand load_half(const Unit* from) { return load_half_pairs(from); }
  static Operand spread(Scalar x) { return spread_pair(x); }
  static Vec accumulate(Vec acc, Operand a, Operand b) { return dot_pairs(acc, a, b); }
  static void store_scalars(Scalar* to, Vec x) { store_as_pairs(to, x); }
};

// The same plane where the second number of each pair lies beyond the last visible key: it may be anything.
template <class Plane>
struct FirstOnly : Plane {};

template <>
struct FirstOnly<BFloat16Plane> : BFloat16Plane {
  static Operand load(const Unit* from) { return first_of_pairs(load_pairs(from)); }
  static Operand load_half(const Unit* from) { return first_of_pairs(load_half_pairs(from)); }
};

// The same where the first number of each pair lies before a window.
template <class Plane>
struct SecondOnly : Plane {};

template <>
struct SecondOnly<BFloat16Plane> : BFloat16Plane {
  static Operand load(const Unit* from) { return second_of_pairs(load_pairs(from)); }
  static Operand load_half(const Unit* from) { return second_of_pairs(load_half_pairs(from)); }
};

}  // namespace kvist
