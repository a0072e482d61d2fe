// Operators on tensors that are also steps of a larger one. Each checks what it is given.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace kvist {

using at::Tensor;

void write_tensors(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Tensor& slots);

Tensor attend_tensors(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& tables,
                      const Tensor& starts, const Tensor& lengths, double scale, int64_t window, double softcap);

std::tuple<Tensor, Tensor> attend_own_tensors(const Tensor& q, const Tensor& keys, const Tensor& values,
                                              const Tensor& tables, const Tensor& starts, const Tensor& lengths,
                                              double scale, int64_t window, double softcap);

Tensor attend_coded_tensors(const Tensor& q, const Tensor& own, const Tensor& lse, at::TensorList key_planes,
                            at::IntArrayRef key_coding, at::TensorList key_frame, at::TensorList value_planes,
                            at::IntArrayRef value_coding, at::TensorList value_frame, const Tensor& tables,
                            const Tensor& starts, const Tensor& lengths, int64_t block_size, double scale,
                            int64_t window, double softcap);

void seal_tensors(const Tensor& open, at::TensorList planes, at::IntArrayRef coding, at::TensorList frame, bool keys,
                  const Tensor& sources, const Tensor& targets);

}  // namespace kvist
