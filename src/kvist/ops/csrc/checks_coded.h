// As checks.h, of streams that may be coded.
#pragma once

#include "attend_coded.h"
#include "checks.h"

namespace kvist {

using at::IntArrayRef;
using at::TensorList;

// A stream's tensors, checked: how it is coded, or `coding` without segments and one plane of numbers.
struct CheckedStream {
  Coding coding;
  Frame frame;
  Geometry geometry;
  std::vector<Tensor> planes;

  bool coded() const { return coding.count() > 0; }
  StreamPlanes pointers() const {
    if (!coded()) return {std::nullopt, planes[0].const_data_ptr(), geometry.type};
    return {CodedStream{coding, frame, planes[0].const_data_ptr<uint8_t>(),
                        static_cast<const Float16*>(planes[1].const_data_ptr())},
            nullptr, Number::kFloat32};
  }
};

CheckedStream check_stream(TensorList planes, IntArrayRef coding, TensorList frame, bool keys);

}  // namespace kvist
