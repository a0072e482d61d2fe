// What the bindings have in common: tensors are checked here, before a kernel trusts a pointer or a block id.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <tuple>

#include "batch.h"
#include "vec.h"

namespace kvist {

using at::Tensor;

inline Number number(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Number::kFloat32;
    case at::kBFloat16: return Number::kBFloat16;
    case at::kHalf: return Number::kFloat16;
    default: TORCH_CHECK_VALUE(false, name, " must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// What a stream's planes hold. `type` is that of a plane of numbers.
struct Geometry {
  int64_t blocks, heads, block_size, head_dim;
  Number type;
};

// Of one plane of numbers.
inline Geometry plane_geometry(const Tensor& plane, bool keys) {
  const char* name = keys ? "key plane" : "value plane";
  const Number type = number(plane, keys ? "the key plane" : "the value plane");
  const bool paired = type == Number::kBFloat16;
  const int64_t pack = paired ? 2 : 1, axes = (keys ? 5 : 4) + paired;
  TORCH_CHECK_VALUE(plane.dim() == axes, "a ", plane.scalar_type(), " ", name, " has ", axes, " dimensions, got ",
                    plane.sizes());
  TORCH_CHECK_VALUE((!keys || plane.size(4) == kLanes) && (!paired || plane.size(axes - 1) == 2), "not a ", name, ": ",
                    plane.sizes());
  const Geometry g{plane.size(0), plane.size(1), plane.size(2) * (keys ? kLanes : pack),
                   plane.size(3) * (keys ? pack : 1), type};
  TORCH_CHECK_VALUE(g.block_size >= kLanes && kSplit % g.block_size == 0,
                    "block_size must be a multiple of 16 that divides 512, got ", g.block_size);
  TORCH_CHECK_VALUE(g.head_dim % 8 == 0 && g.head_dim >= 8 && g.head_dim <= kMaxHeadDim,
                    "head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", got ", g.head_dim);
  TORCH_CHECK_VALUE(plane.is_contiguous(), "planes must be contiguous");
  return g;
}

// Of a key plane and the value plane that belongs to it.
inline Geometry geometry(const Tensor& keys, const Tensor& values) {
  const Geometry g = plane_geometry(keys, true);
  const bool paired = g.type == Number::kBFloat16;
  const bool matches = values.scalar_type() == keys.scalar_type() && values.dim() == (paired ? 5 : 4) &&
                       values.numel() == keys.numel() && values.size(0) == g.blocks && values.size(1) == g.heads &&
                       values.size(2) == g.block_size / (paired ? 2 : 1) && values.size(3) == g.head_dim;
  TORCH_CHECK_VALUE(matches, "the value plane ", values.scalar_type(), " ", values.sizes(),
                    " does not belong to the key plane ", keys.scalar_type(), " ", keys.sizes());
  TORCH_CHECK_VALUE(values.is_contiguous(), "planes must be contiguous");
  return g;
}

// x [T, heads, head_dim] as the kernels take it: the last two axes dense, any distance between tokens.
inline Tensor by_token(const Tensor& x) {
  const bool dense = x.stride(2) == 1 && x.stride(1) == x.size(2);
  return dense ? x : x.contiguous();
}

// A checked batch, and the tensors that it points into.
struct CheckedBatch {
  Tensor q, tables, starts, lengths;
  Batch batch;

  int64_t used() const { return batch.starts[batch.sequences]; }  // rows that are not padding
  // A row for each of q, zeros where there is padding.
  Tensor result(at::ScalarType type) const {
    const Tensor out = at::empty({q.size(0), q.size(1), batch.head_dim}, q.options().dtype(type));
    if (used() < q.size(0)) out.narrow(0, used(), q.size(0) - used()).zero_();
    return out;
  }
};

// Blocks that lie wholly before the windows of all queries are not read, and may be anything.
inline void check_metadata(const Geometry& g, const Tensor& tables, const Tensor& starts, const Tensor& lengths,
                           int64_t rows, int64_t window) {
  TORCH_CHECK_VALUE(lengths.dim() == 1 && tables.dim() == 2 && tables.size(0) == lengths.size(0) &&
                        starts.dim() == 1 && starts.size(0) == lengths.size(0) + 1,
                    "attend needs tables [S, max_blocks], starts [S + 1] and lengths [S], got ", tables.sizes(), ", ",
                    starts.sizes(), " and ", lengths.sizes());
  TORCH_CHECK_VALUE(
      tables.scalar_type() == at::kInt && starts.scalar_type() == at::kInt && lengths.scalar_type() == at::kInt,
      "tables, starts and lengths are int32, got ", tables.scalar_type(), ", ", starts.scalar_type(), ", ",
      lengths.scalar_type());
  const int32_t *start = starts.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(start[0] == 0, "starts must begin with 0, got ", start[0]);
  for (int64_t s = 0; s < lengths.size(0); s++) {
    const int64_t count = int64_t{start[s + 1]} - start[s];
    TORCH_CHECK_VALUE(count >= 0 && start[s + 1] <= rows, "starts must rise from 0 to at most the ", rows,
                      " rows of q, got ", start[s], " then ", start[s + 1]);
    TORCH_CHECK_VALUE(length[s] >= count && length[s] <= tables.size(1) * g.block_size,
                      "lengths must cover each sequence's ", count, " queries and fit its ", tables.size(1),
                      " blocks of ", g.block_size, ", got ", length[s]);
    const int32_t* table = tables.const_data_ptr<int32_t>() + s * tables.size(1);
    const int64_t oldest = window && count ? std::max<int64_t>(0, length[s] - count + 1 - window) : 0;
    for (int64_t i = oldest / g.block_size; i < (length[s] + g.block_size - 1) / g.block_size; i++)
      TORCH_CHECK_INDEX(table[i] >= 0 && table[i] < g.blocks, "block ids must be in [0, ", g.blocks, "), got ",
                        table[i]);
  }
}

// `key_dim`: of queries.
inline CheckedBatch check_batch(const Geometry& g, int64_t key_dim, const Tensor& q, const Tensor& tables,
                                const Tensor& starts, const Tensor& lengths, double scale, bool whole_blocks,
                                int64_t window, double softcap) {
  TORCH_CHECK_VALUE(g.heads > 0 && q.dim() == 3 && q.size(2) == key_dim && q.size(1) > 0 && q.size(1) % g.heads == 0,
                    "attend needs q [T, a multiple of ", g.heads, ", ", key_dim, "], got ", q.sizes());
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "scale must be positive and finite, got ", scale);
  TORCH_CHECK_VALUE(window >= 0 && window <= int64_t{1} << 31, "a window is not negative, got ", window);
  TORCH_CHECK_VALUE(std::isfinite(softcap) && softcap >= 0, "softcap must be finite and not negative, got ", softcap);
  const Number type = number(q, "q");
  CheckedBatch checked{by_token(q), tables.contiguous(), starts.contiguous(), lengths.contiguous(), {}};
  check_metadata(g, checked.tables, checked.starts, checked.lengths, q.size(0), window);
  checked.batch = {checked.q.const_data_ptr(),
                   checked.q.stride(0),
                   type,
                   q.size(1),
                   g.heads,
                   g.block_size,
                   g.head_dim,
                   key_dim,
                   checked.tables.const_data_ptr<int32_t>(),
                   checked.tables.size(1),
                   checked.starts.const_data_ptr<int32_t>(),
                   checked.lengths.const_data_ptr<int32_t>(),
                   checked.lengths.size(0),
                   scale,
                   whole_blocks,
                   window,
                   softcap};
  return checked;
}

}  // namespace kvist
