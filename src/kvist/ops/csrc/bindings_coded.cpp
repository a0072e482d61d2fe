// The operators over codes, as bindings.cpp has the others.
#include <torch/library.h>

#include "checks_coded.h"
#include "operators.h"
#include "seal.h"

namespace kvist {

Tensor attend_coded_tensors(const Tensor& q, const Tensor& own, const Tensor& lse, TensorList key_planes,
                            IntArrayRef key_coding, TensorList key_frame, TensorList value_planes,
                            IntArrayRef value_coding, TensorList value_frame, const Tensor& tables,
                            const Tensor& starts, const Tensor& lengths, int64_t block_size, double scale,
                            int64_t window, double softcap) {
  const CheckedStream keys = check_stream(key_planes, key_coding, key_frame, true);
  const CheckedStream values = check_stream(value_planes, value_coding, value_frame, false);
  const Geometry &a = keys.geometry, &b = values.geometry;
  TORCH_CHECK_VALUE(keys.coded() || values.coded(), "attend_coded needs a stream that is coded");
  TORCH_CHECK_VALUE(a.heads == b.heads && a.block_size == b.block_size && a.head_dim == b.head_dim,
                    "the key planes hold ", a.heads, " heads of ", a.head_dim, " in blocks of ", a.block_size,
                    ", the value planes ", b.heads, " of ", b.head_dim, " in blocks of ", b.block_size);
  TORCH_CHECK_VALUE(block_size == a.block_size, "block_size is ", block_size, ", but the planes hold blocks of ",
                    a.block_size);
  const Geometry both{std::min(a.blocks, b.blocks), a.heads, a.block_size, a.head_dim, a.type};
  const CheckedBatch checked =
      check_batch(both, both.head_dim, q, tables, starts, lengths, scale, true, window, softcap);
  TORCH_CHECK_VALUE(own.sizes() == q.sizes() && lse.sizes() == q.sizes().slice(0, 2) &&
                        own.scalar_type() == at::kFloat && lse.scalar_type() == at::kFloat,
                    "own and lse are float32 ", q.sizes(), " and ", q.sizes().slice(0, 2), ", got ", own.scalar_type(),
                    " ", own.sizes(), " and ", lse.scalar_type(), " ", lse.sizes());
  const Tensor own_rows = own.contiguous(), own_sums = lse.contiguous(), out = checked.result(q.scalar_type());
  if (checked.used())
    attend_coded({checked.batch, keys.pointers(), values.pointers(), own_rows.const_data_ptr<float>(),
                  own_sums.const_data_ptr<float>(), out.mutable_data_ptr()});
  return out;
}

static Tensor check_blocks(const Tensor& ids, const char* name, int64_t blocks) {
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.scalar_type() == at::kLong, name, " must be [N] int64, got ", ids.sizes(),
                    " ", ids.scalar_type());
  const Tensor dense = ids.contiguous();
  const int64_t* first = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.size(0); i++)
    TORCH_CHECK_INDEX(first[i] >= 0 && first[i] < blocks, name, " must be in [0, ", blocks, "), got ", first[i]);
  return dense;
}

void seal_tensors(const Tensor& open, TensorList planes, IntArrayRef coding, TensorList frame, bool keys,
                  const Tensor& sources, const Tensor& targets) {
  const CheckedStream stream = check_stream(planes, coding, frame, keys);
  const Geometry from = plane_geometry(open, keys), &to = stream.geometry;
  TORCH_CHECK_VALUE(from.heads == to.heads && from.block_size == to.block_size && from.head_dim == to.head_dim,
                    "the open plane holds ", from.heads, " heads of ", from.head_dim, " in blocks of ",
                    from.block_size, ", the planes ", to.heads, " of ", to.head_dim, " in blocks of ", to.block_size);
  const Tensor source = check_blocks(sources, "sources", from.blocks);
  const Tensor target = check_blocks(targets, "targets", to.blocks);
  TORCH_CHECK_VALUE(source.size(0) == target.size(0), "seal needs a target for each source, got ", target.size(0),
                    " for ", source.size(0));
  void* plane = planes[0].mutable_data_ptr();
  Float16* scales = stream.coded() ? static_cast<Float16*>(planes[1].mutable_data_ptr()) : nullptr;
  seal({open.const_data_ptr(), from.type, keys, from.heads, from.block_size, from.head_dim,
        stream.coded() ? &stream.coding : nullptr, stream.frame, static_cast<uint8_t*>(plane), scales, plane, to.type,
        source.const_data_ptr<int64_t>(), target.const_data_ptr<int64_t>(), source.size(0)});
}

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CPU, library) {
  library.impl("attend_coded", &attend_coded_tensors);
  library.impl("seal", &seal_tensors);
}

}  // namespace kvist
