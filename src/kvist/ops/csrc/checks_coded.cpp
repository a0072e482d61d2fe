#include "checks_coded.h"

namespace kvist {
namespace {

// The numbers of `Coding.flat`, one after another.
class Flat {
 public:
  explicit Flat(IntArrayRef numbers) : numbers_(numbers) {}

  int64_t next(int64_t least, int64_t most, const char* what) {
    TORCH_CHECK_VALUE(at_ < numbers_.size(), "a coding ends before ", what, ": ", numbers_);
    const int64_t number = numbers_[at_++];
    TORCH_CHECK_VALUE(number >= least && number <= most, what, " must be in [", least, ", ", most, "], got ", number);
    return number;
  }

  void end() const {
    TORCH_CHECK_VALUE(at_ == numbers_.size(), "a coding has ", numbers_.size() - at_, " numbers too many: ", numbers_);
  }

 private:
  IntArrayRef numbers_;
  size_t at_ = 0;
};

Segment parse_segment(Flat& flat, int64_t first) {
  Segment segment{first, flat.next(16, kMaxCodedDim, "a segment's channels"), flat.next(2, 8, "bits"), {}, 0};
  TORCH_CHECK_VALUE(segment.dims % 16 == 0, "a segment has a multiple of 16 channels, got ", segment.dims);
  TORCH_CHECK_VALUE(segment.bits <= 4 || segment.bits == 8, "codes have 2, 3, 4 or 8 bits, got ", segment.bits);
  for (int64_t i = 0; segment.bits != 8 && i < 1 << segment.bits; i++) {
    segment.levels[i] = static_cast<int8_t>(flat.next(-127, 127, "a level"));
    TORCH_CHECK_VALUE(i == 0 || segment.levels[i] > segment.levels[i - 1], "levels ascend, got ",
                      int64_t{segment.levels[i]}, " after ", int64_t{segment.levels[i - 1]});
  }
  return segment;
}

Coding parse_coding(IntArrayRef numbers) {
  Flat flat(numbers);
  Coding coding{static_cast<Rule>(flat.next(0, 3, "a coding's rule")), {}, {}, 0};
  int64_t rotated = 0;
  for (int64_t left = flat.next(0, kMaxCodedDim, "the number of Hadamard blocks"); left > 0; left--) {
    const int64_t size = flat.next(1, kMaxCodedDim, "the size of a Hadamard block");
    TORCH_CHECK_VALUE((size & (size - 1)) == 0, "a Hadamard block has a power of two of channels, got ", size);
    coding.rotation.push_back(size);
    rotated += size;
  }
  for (int64_t left = flat.next(1, kMaxCodedDim / 16, "the number of segments"); left > 0; left--) {
    coding.segments.push_back(parse_segment(flat, coding.dim));
    coding.dim += coding.segments.back().dims;
    TORCH_CHECK_VALUE(coding.rule != Rule::kSignedMax || coding.segments.back().bits < 8,
                      "a coding by the signed maximum has levels, and so less than 8 bits");
  }
  flat.end();
  TORCH_CHECK_VALUE(coding.dim >= 32 && coding.dim <= kMaxCodedDim, "coded heads have 32 to ", kMaxCodedDim,
                    " channels, not ", coding.dim);
  TORCH_CHECK_VALUE(coding.rotation.empty() || rotated == coding.dim, "the rotation covers ", rotated, " of ",
                    coding.dim, " channels");
  return coding;
}

void check_frame(CheckedStream& stream, TensorList frame) {
  const int64_t heads = stream.geometry.heads, dim = stream.coding.dim;
  const std::array<int64_t, 2> by_head{heads, dim};
  const std::array<int64_t, 1> once{dim}, by_segment{stream.coding.count()};
  const auto check = [](const Tensor& x, const char* name, IntArrayRef sizes, at::ScalarType type) {
    TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == type && x.is_contiguous(), "a frame's ", name,
                      " must be a contiguous ", sizes, " ", type, ", got ", x.sizes(), " ", x.scalar_type());
  };
  check(frame[0], "mean", by_head, at::kFloat);
  check(frame[1], "order", by_head, at::kInt);
  check(frame[2], "signs", once, at::kFloat);
  check(frame[3], "levels per deviation", by_segment, at::kFloat);
  const int32_t* order = frame[1].const_data_ptr<int32_t>();
  bool inside = true;
  for (int64_t i = 0; i < heads * dim; i++) inside &= static_cast<uint32_t>(order[i]) < static_cast<uint32_t>(dim);
  TORCH_CHECK_INDEX(inside, "a frame's order names channels in [0, ", dim, ")");
  for (int64_t i = 0; i < stream.coding.count(); i++)
    stream.coding.segments[i].per_deviation = frame[3].const_data_ptr<float>()[i];
  stream.frame = {frame[0].const_data_ptr<float>(), order, frame[2].const_data_ptr<float>()};
}

}  // namespace

CheckedStream check_stream(TensorList planes, IntArrayRef coding, TensorList frame, bool keys) {
  CheckedStream stream{{}, {}, {}, planes.vec()};
  if (coding.empty()) {
    TORCH_CHECK_VALUE(planes.size() == 1 && frame.empty(),
                      "a stream that is not coded has one plane and no frame, got ", planes.size(), " planes and ",
                      frame.size(), " tensors of a frame");
    stream.geometry = plane_geometry(planes[0], keys);
    return stream;
  }
  TORCH_CHECK_VALUE(planes.size() == 2 && frame.size() == 4,
                    "a coded stream has two planes and four tensors of its frame, got ", planes.size(), " and ",
                    frame.size());
  stream.coding = parse_coding(coding);
  const Tensor &codes = planes[0], &scales = planes[1];
  TORCH_CHECK_VALUE(scales.dim() == 4 && scales.scalar_type() == at::kHalf && scales.is_contiguous() &&
                        scales.size(2) == stream.coding.count(),
                    "scales are a contiguous [blocks, H, ", stream.coding.count(), ", B] float16, got ", scales.sizes(),
                    " ", scales.scalar_type());
  const int64_t size = scales.size(3);
  TORCH_CHECK_VALUE(size == 16 || size == 32 || size == 64, "a coded block holds 16, 32 or 64 tokens, not ", size);
  const std::array<int64_t, 3> expected{scales.size(0), scales.size(1), stream.coding.code_bytes(size)};
  TORCH_CHECK_VALUE(codes.sizes() == IntArrayRef(expected) && codes.scalar_type() == at::kByte && codes.is_contiguous(),
                    "codes are a contiguous ", IntArrayRef(expected), " uint8, got ", codes.sizes(), " ",
                    codes.scalar_type());
  stream.geometry = {expected[0], expected[1], size, stream.coding.dim, Number::kFloat32};
  check_frame(stream, frame);
  return stream;
}

}  // namespace kvist
