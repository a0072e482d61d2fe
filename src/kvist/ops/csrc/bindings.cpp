// The operators as PyTorch knows them: everything is checked here, before a kernel trusts a pointer or a block id.
// kvist/ops/schema.py owns the schemas and says what each operator does.
// bindings_coded.cpp does the same for the operators over codes.
#include <torch/library.h>

#include <string>

#include "attend.h"
#include "checks.h"
#include "elementwise.h"
#include "operators.h"
#include "write.h"

namespace kvist {

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

Tensor attend_tensors(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& tables,
                      const Tensor& starts, const Tensor& lengths, double scale, int64_t window, double softcap) {
  const Geometry g = geometry(keys, values);
  const CheckedBatch checked = check_batch(g, g.head_dim, q, tables, starts, lengths, scale, false, window, softcap);
  const Tensor out = checked.result(q.scalar_type());
  if (checked.used())
    attend({checked.batch, keys.const_data_ptr(), values.const_data_ptr(), g.type, out.mutable_data_ptr(), nullptr});
  return out;
}

std::tuple<Tensor, Tensor> attend_own_tensors(const Tensor& q, const Tensor& keys, const Tensor& values,
                                              const Tensor& tables, const Tensor& starts, const Tensor& lengths,
                                              double scale, int64_t window, double softcap) {
  const Geometry g = geometry(keys, values);
  const CheckedBatch checked = check_batch(g, g.head_dim, q, tables, starts, lengths, scale, false, window, softcap);
  const Tensor out = checked.result(at::kFloat), lse = at::empty({q.size(0), q.size(1)}, out.options());
  lse.narrow(0, checked.used(), q.size(0) - checked.used()).fill_(-INFINITY);
  if (checked.used())
    attend({checked.batch, keys.const_data_ptr(), values.const_data_ptr(), g.type, out.mutable_data_ptr(),
            lse.mutable_data_ptr<float>()});
  return {out, lse};
}

namespace {

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
  library.impl("attend_own", &attend_own_tensors);
  library.impl("silu_mul", &silu_mul_tensor);
  library.impl("gelu", &gelu_tensor);
}

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", [] { return std::string(instruction_set()); });
}

}  // namespace kvist
