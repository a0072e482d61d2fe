// The operator over keys that are made of the values, as bindings.cpp has the others.
#include <torch/library.h>

#include "checks_coded.h"

namespace kvist {
namespace {

Tie check_tie(TensorList tie, const CheckedBatch& checked) {
  const Batch& batch = checked.batch;
  TORCH_CHECK_VALUE(tie.size() == 4, "tied keys need weight, cos, sin and offsets, got ", tie.size(), " tensors");
  const Tensor &weight = tie[0], &cos = tie[1], &sin = tie[2], &offsets = tie[3];
  for (const Tensor& x : {weight, cos, sin})
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous(),
                      "what keys are made with is contiguous float32, got ", x.scalar_type(), " ", x.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == batch.head_dim, "weight must be [", batch.head_dim,
                    "], got ", weight.sizes());
  TORCH_CHECK_VALUE(cos.dim() == 3 && cos.size(2) == kLanes && cos.sizes() == sin.sizes() &&
                        2 * cos.size(1) <= batch.head_dim,
                    "cos and sin must be [positions / 16, pairs, 16], the pairs at most half of ", batch.head_dim,
                    ", got ", cos.sizes(), " and ", sin.sizes());
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == batch.sequences && offsets.scalar_type() == at::kInt &&
                        offsets.is_contiguous(),
                    "offsets must be a contiguous [", batch.sequences, "] int32, got ", offsets.scalar_type(), " ",
                    offsets.sizes());
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < batch.sequences; s++) {
    const int64_t end = offset[s] + (int64_t{batch.lengths[s]} + kLanes - 1) / kLanes * kLanes;
    TORCH_CHECK_VALUE(offset[s] >= 0 && offset[s] % kLanes == 0 && end <= cos.size(0) * kLanes,
                      "offsets are multiples of 16, and positions up to ", end, " need so many of cos and sin, got ",
                      offset[s], " and ", cos.size(0) * kLanes);
  }
  return {weight.const_data_ptr<float>(),
          cos.const_data_ptr<float>(),
          sin.const_data_ptr<float>(),
          cos.size(1),
          offset};
}

std::tuple<Tensor, Tensor> attend_made_tensors(const Tensor& q, TensorList own, TensorList behind_planes,
                                               IntArrayRef behind_coding, TensorList behind_frame,
                                               TensorList value_planes, IntArrayRef value_coding,
                                               TensorList value_frame, TensorList tie, const Tensor& tables,
                                               const Tensor& starts, const Tensor& lengths, int64_t block_size,
                                               double scale, int64_t window) {
  const CheckedStream values = check_stream(value_planes, value_coding, value_frame, false);
  Geometry g = values.geometry;
  std::optional<CheckedStream> behind;
  TORCH_CHECK_VALUE(behind_planes.empty() != tie.empty(), "keys have something behind the values, or are tied");
  if (!behind_planes.empty()) {
    behind = check_stream(behind_planes, behind_coding, behind_frame, true);
    const Geometry& b = behind->geometry;
    TORCH_CHECK_VALUE(b.heads == g.heads && b.block_size == g.block_size, "the planes behind hold ", b.heads,
                      " heads in blocks of ", b.block_size, ", the value planes ", g.heads, " in blocks of ",
                      g.block_size);
    g.blocks = std::min(g.blocks, b.blocks);
  }
  TORCH_CHECK_VALUE(block_size == g.block_size, "block_size is ", block_size, ", but the planes hold blocks of ",
                    g.block_size);
  TORCH_CHECK_VALUE(own.empty() || own.size() == 2, "own is nothing, or a result and its lse, got ", own.size(),
                    " tensors");
  const int64_t key_dim = g.head_dim + (behind ? behind->geometry.head_dim : 0);
  const CheckedBatch checked = check_batch(g, key_dim, q, tables, starts, lengths, scale, !own.empty(), window, 0);
  const Tensor out = checked.result(at::kFloat), lse = at::empty({q.size(0), q.size(1)}, out.options());
  lse.narrow(0, checked.used(), q.size(0) - checked.used()).fill_(-INFINITY);
  Tensor own_rows, own_sums;
  if (!own.empty()) {
    TORCH_CHECK_VALUE(own[0].sizes() == out.sizes() && own[1].sizes() == lse.sizes() &&
                          own[0].scalar_type() == at::kFloat && own[1].scalar_type() == at::kFloat,
                      "own and its lse are float32 ", out.sizes(), " and ", lse.sizes(), ", got ", own[0].scalar_type(),
                      " ", own[0].sizes(), " and ", own[1].scalar_type(), " ", own[1].sizes());
    own_rows = own[0].contiguous();
    own_sums = own[1].contiguous();
  }
  if (!checked.used()) return {out, lse};
  attend_made({checked.batch, values.pointers(), behind ? std::optional(behind->pointers()) : std::nullopt,
               tie.empty() ? std::nullopt : std::optional(check_tie(tie, checked)),
               own.empty() ? nullptr : own_rows.const_data_ptr<float>(),
               own.empty() ? nullptr : own_sums.const_data_ptr<float>(), out.mutable_data_ptr<float>(),
               lse.mutable_data_ptr<float>()});
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CPU, library) { library.impl("attend_made", &attend_made_tensors); }

}  // namespace kvist
