// What stands between two attentions of a decoder layer, fused: norms, products of packed weights, rotary positions,
// gates and residuals. In float32; a row's bits depend on it alone.
#pragma once

#include "packed.h"

namespace kvist {

struct Norm {
  const float* weight;  // [size], or null: no norm
  float eps;
};

// norm(x) * weight + bias, then each of the first `heads` heads normed on its own and rotated by its row's angles.
struct Projection {
  Norm norm;
  Packed weight;
  const float* bias;
  int64_t query_heads, key_heads, head_dim;  // heads behind these are left as they are
  Norm query_norm, key_norm;                 // over a head
  const float *cos, *sin;                    // [rows, rotated], or null; dimension i pairs with i + rotated / 2
  int64_t rotated;
};
void project(const Projection& p, const float* x, int64_t rows, float* out);

// x + out * attended, then + down * (gate * up of its norm); norms of what is added where there are any.
struct Ending {
  Packed out;
  const float* out_bias;
  Norm out_norm;  // of what attention adds, before it is added
  Norm norm;
  Packed gate_up;
  Gate gate;
  Packed down;
  Norm down_norm;  // of what the MLP adds, before it is added
};
void end_layer(const Ending& e, const float* x, const float* attended, int64_t rows, float* result);

// out = weight * norm(x) + bias.
void linear(const Norm& norm, const Packed& weight, const float* bias, const float* x, int64_t rows, float* out);

}  // namespace kvist
