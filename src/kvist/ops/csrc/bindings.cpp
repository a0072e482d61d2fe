// The operators as PyTorch knows them: everything is checked here, before a kernel trusts a pointer or a block id.
// kvist/ops/schema.py owns the schemas and says what each operator does.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "attend.h"
#include "elementwise.h"
#include "vec.h"
#include "write.h"

namespace kvist {
namespace {

using at::Tensor;

Number number(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Number::kFloat32;
    case at::kBFloat16: return Number::kBFloat16;
    case at::kHalf: return Number::kFloat16;
    default: TORCH_CHECK_VALUE(false, name, " must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

struct Geometry {
  int64_t blocks, heads, block_size, head_dim;
  Number type;
};

Geometry geometry(const Tensor& keys, const Tensor& values) {
  const Number type = number(keys, "the key plane");
  const bool paired = type == Number::kBFloat16;
  TORCH_CHECK_VALUE(keys.dim() == (paired ? 6 : 5), "a ", keys.scalar_type(), " key plane has ", paired ? 6 : 5,
                    " dimensions, got ", keys.sizes());
  const Geometry g{keys.size(0), keys.size(1), keys.size(2) * kLanes, keys.size(3) * (paired ? 2 : 1), type};
  TORCH_CHECK_VALUE(g.block_size >= kLanes && kSplit % g.block_size == 0,
                    "block_size must be a multiple of 16 that divides 512, got ", g.block_size);
  TORCH_CHECK_VALUE(g.head_dim % 8 == 0 && g.head_dim >= 8 && g.head_dim <= kMaxHeadDim,
                    "head_dim must be a multiple of 8 up to 256, got ", g.head_dim);
  TORCH_CHECK_VALUE(keys.size(4) == kLanes && (!paired || keys.size(5) == 2), "not a key plane: ", keys.sizes());
  const bool matches = values.scalar_type() == keys.scalar_type() && values.dim() == (paired ? 5 : 4) &&
                       values.numel() == keys.numel() && values.size(0) == g.blocks && values.size(1) == g.heads &&
                       values.size(2) == g.block_size / (paired ? 2 : 1) && values.size(3) == g.head_dim;
  TORCH_CHECK_VALUE(matches, "the value plane ", values.scalar_type(), " ", values.sizes(),
                    " does not belong to the key plane ", keys.scalar_type(), " ", keys.sizes());
  TORCH_CHECK_VALUE(keys.is_contiguous() && values.is_contiguous(), "planes must be contiguous");
  return g;
}

// x [T, heads, head_dim] as the kernels take it: the last two axes dense, any distance between tokens.
Tensor by_token(const Tensor& x) {
  const bool dense = x.stride(2) == 1 && x.stride(1) == x.size(2);
  return dense ? x : x.contiguous();
}

void write_tensors(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const Geometry g = geometry(keys, values);
  TORCH_CHECK_VALUE(slots.dim() == 1 && slots.scalar_type() == at::kLong, "slots must be [T] int64, got ",
                    slots.sizes(), " ", slots.scalar_type());
  const std::array<int64_t, 3> rows{slots.size(0), g.heads, g.head_dim};
  TORCH_CHECK_VALUE(k.sizes() == rows && v.sizes() == rows, "write needs k and v [", rows[0], ", ", rows[1], ", ",
                    rows[2], "], got ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE(k.scalar_type() == v.scalar_type(), "write takes k and v of one dtype, got ", k.scalar_type(),
                    " and ", v.scalar_type());
  const Number type = number(k, "k");
  const Tensor where = slots.contiguous(), k_rows = by_token(k), v_rows = by_token(v);
  const int64_t* first = where.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows[0]; i++)
    TORCH_CHECK_INDEX(first[i] >= -1 && first[i] < g.blocks * g.block_size, "slots must be -1 (padding) or in [0, ",
                      g.blocks * g.block_size, "), got ", first[i]);
  write({k_rows.const_data_ptr(), v_rows.const_data_ptr(), k_rows.stride(0), v_rows.stride(0), type,
         keys.mutable_data_ptr(), values.mutable_data_ptr(), g.type, g.heads, g.block_size, g.head_dim, first,
         rows[0]});
}

void check_metadata(const Geometry& g, const Tensor& tables, const Tensor& starts, const Tensor& lengths,
                    int64_t rows) {
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
    for (int64_t i = 0; i < (length[s] + g.block_size - 1) / g.block_size; i++)
      TORCH_CHECK_INDEX(table[i] >= 0 && table[i] < g.blocks, "block ids must be in [0, ", g.blocks, "), got ",
                        table[i]);
  }
}

Tensor attend_tensors(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& tables,
                      const Tensor& starts, const Tensor& lengths, double scale) {
  const Geometry g = geometry(keys, values);
  TORCH_CHECK_VALUE(q.dim() == 3 && q.size(2) == g.head_dim && q.size(1) > 0 && q.size(1) % g.heads == 0,
                    "attend needs q [T, a multiple of ", g.heads, ", ", g.head_dim, "], got ", q.sizes());
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "scale must be positive and finite, got ", scale);
  const Number type = number(q, "q");
  const Tensor table = tables.contiguous(), start = starts.contiguous(), length = lengths.contiguous();
  check_metadata(g, table, start, length, q.size(0));
  const Tensor rows = by_token(q), out = at::empty(q.sizes(), q.options());
  const int64_t used = start.const_data_ptr<int32_t>()[length.size(0)];
  if (used < q.size(0)) out.narrow(0, used, q.size(0) - used).zero_();
  if (used > 0)
    attend({rows.const_data_ptr(), rows.stride(0), out.mutable_data_ptr(), type, keys.const_data_ptr(),
            values.const_data_ptr(), g.type, g.heads, g.block_size, g.head_dim, table.const_data_ptr<int32_t>(),
            table.size(1), start.const_data_ptr<int32_t>(), length.const_data_ptr<int32_t>(), length.size(0),
            q.size(1), scale});
  return out;
}

Tensor silu_mul_tensor(const Tensor& gate_up) {
  TORCH_CHECK_VALUE(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "silu_mul takes [..., 2I], got ", gate_up.sizes());
  const Number type = number(gate_up, "gate_up");
  const Tensor dense = gate_up.contiguous();
  std::vector<int64_t> shape = gate_up.sizes().vec();
  const int64_t width = shape.back() /= 2;
  const Tensor out = at::empty(shape, gate_up.options());
  silu_mul(type, dense.const_data_ptr(), out.mutable_data_ptr(), width ? out.numel() / width : 0, width);
  return out;
}

Tensor gelu_tensor(const Tensor& x, bool tanh) {
  const Number type = number(x, "x");
  const Tensor dense = x.contiguous(), out = at::empty(x.sizes(), x.options());
  gelu(type, dense.const_data_ptr(), out.mutable_data_ptr(), x.numel(), tanh);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CPU, library) {
  library.impl("write", &write_tensors);
  library.impl("attend", &attend_tensors);
  library.impl("silu_mul", &silu_mul_tensor);
  library.impl("gelu", &gelu_tensor);
}

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", [] { return std::string(instruction_set()); });
}

}  // namespace kvist
