// Products of packed weights, whose numbers are whole, with rows that are made whole for it.
//
// kvist/ops/packed.py owns the layout of a packed weight. In short: 64 outputs make a strip; in a strip the groups of
// input columns follow each other, each with its 64 scales (float16) and then its codes, four columns of an output side
// by side, as an instruction takes them that multiplies four bytes by four and adds them up.
//
// A row is cut into the same groups, each of which has its own scale. Within a group everything is a whole number, so
// its sum is exact in whatever order it is computed; the groups are added up one after another in float32. A row's bits
// depend on it and on the weight alone: not on the rows beside it, on threads, or on the sizes of tiles.
#pragma once

#include <cstdint>

#include "buffer.h"

namespace kvist {

constexpr int64_t kStrip = 64;  // outputs

struct Packed {
  const uint8_t* data;
  int64_t rows, columns, bits, group;
  bool paired;  // a strip holds 32 gates and the 32 ups that belong to them

  int64_t groups() const { return (columns + group - 1) / group; }
  int64_t width() const { return groups() * group; }  // the columns with those that fill up the last group
  int64_t outputs() const { return paired ? rows / 2 : rows; }
  int64_t strip_outputs() const { return paired ? kStrip / 2 : kStrip; }
  int64_t strips() const { return (outputs() + strip_outputs() - 1) / strip_outputs(); }
  int64_t group_bytes() const { return kStrip * 2 + kStrip * group * bits / 8; }
  int64_t strip_bytes() const { return groups() * group_bytes(); }
};

// Rows of whole numbers: codes [rows, width], scales and the sums of the codes [rows, groups].
struct Coded {
  Coded(int64_t rows, int64_t width, int64_t groups)
      : width(width), groups(groups), codes(make_buffer<int8_t>(rows * width + kSlack)),
        scales(make_buffer<float>(rows * groups)), sums(make_buffer<int32_t>(rows * groups)) {}

  static constexpr int64_t kSlack = 64;
  int64_t width, groups;
  Buffer<int8_t> codes;
  Buffer<float> scales;
  Buffer<int32_t> sums;
};

// Row `row` of `coded` from the first `columns` numbers of `x`, from group `first_group` on, which begins at x. A number
// that is not finite makes its group's scale NaN.
void code_row(const float* x, int64_t columns, int64_t group, int64_t first_group, int64_t row, const Coded& coded);

// x / rms(x) * weight over `size` numbers (arXiv 1910.07467), in one fixed order.
void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, float* out);

enum class Gate { kSilu, kGeluTanh };

// What becomes of the sums of a product.
struct Finish {
  const float* bias = nullptr;      // [outputs]
  const float* residual = nullptr;  // [rows, outputs], added last; rows `stride` apart
  float* out = nullptr;             // [rows, outputs]
  int64_t stride = 0;
};

// out[row] = weight * x[row] for all rows of `x`, by all threads that are free.
void multiply(const Packed& weight, const Coded& x, int64_t rows, const Finish& finish);

// gate(weight * x) * up, for a paired weight, as the rows that the next product takes, whose groups are `out.group`.
void multiply_gated(const Packed& weight, const Coded& x, int64_t rows, Gate gate, int64_t next_group, const Coded& out);

// Row `index` of a weight that is not paired, as numbers [columns].
void unpack_row(const Packed& weight, int64_t index, float* out);

}  // namespace kvist
