// The operators over packed weights, as bindings.cpp has the others.
#include <torch/library.h>

#include "checks.h"
#include "float_rows.h"
#include "fused.h"
#include "operators.h"
#include "team.h"

namespace kvist {
namespace {

using at::IntArrayRef;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kLarge = int64_t{4} << 20;  // bytes of a weight, which take ten times as long as to wake threads

// `form`: PackedForm.flat.
Packed packed(const Tensor& data, IntArrayRef form) {
  TORCH_CHECK_VALUE(form.size() == 5, "the form of a packed weight has five numbers, got ", form);
  const Packed w{nullptr, form[0], form[1], form[2], form[3], form[4] != 0};
  TORCH_CHECK_VALUE(w.rows >= 1 && w.rows <= kMaxSize && w.columns >= 1 && w.columns <= kMaxSize && w.group >= 32 &&
                        w.group <= kMaxSize && w.group % 32 == 0 && (w.bits == 4 || w.bits == 8) &&
                        (!w.paired || w.rows % 2 == 0),
                    "there is no packed weight of the form ", form);
  TORCH_CHECK_VALUE(data.scalar_type() == at::kByte && data.dim() == 2 && data.size(0) == w.strips() &&
                        data.size(1) == w.strip_bytes() && data.is_contiguous(),
                    "a packed weight of the form ", form, " is uint8 [", w.strips(), ", ", w.strip_bytes(), "], got ",
                    data.scalar_type(), " ", data.sizes());
  Packed result = w;
  result.data = data.const_data_ptr<uint8_t>();
  return result;
}

// Rows of float32 numbers, dense.
const float* floats(const Tensor& x, IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.sizes() == sizes && x.is_contiguous(), name,
                    " must be dense float32 ", sizes, ", got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}
const float* floats(const OptionalTensor& x, IntArrayRef sizes, const char* name) {
  return x ? floats(*x, sizes, name) : nullptr;
}

Tensor result_of(const Tensor& x, int64_t columns) { return at::empty({x.size(0), columns}, x.options()); }

Tensor packed_linear(const Tensor& x, const OptionalTensor& norm, double eps, const Tensor& data, IntArrayRef form,
                     const OptionalTensor& bias) {
  const Packed w = packed(data, form);
  TORCH_CHECK_VALUE(x.dim() == 2 && !w.paired, "packed_linear takes x [T, columns] and a weight that is not paired");
  const float* from = floats(x, {x.size(0), w.columns}, "x");
  const Tensor out = result_of(x, w.rows);
  // A small one stands among products of PyTorch's, whose threads would spin beside ours; a large one ends a step.
  std::optional<Team::Scope> team;
  if (data.numel() >= kLarge) team.emplace();
  linear({floats(norm, {w.columns}, "norm"), static_cast<float>(eps)}, w, floats(bias, {w.rows}, "bias"), from,
         x.size(0), out.mutable_data_ptr<float>());
  return out;
}

Tensor packed_float(const Tensor& x, const Tensor& data, IntArrayRef form, const OptionalTensor& bias) {
  const Packed w = packed(data, form);
  TORCH_CHECK_VALUE(x.dim() == 2 && !w.paired, "packed_float takes x [T, columns] and a weight that is not paired");
  const float* from = floats(x, {x.size(0), w.columns}, "x");
  Tensor whole = x;
  if (w.width() != w.columns) {
    whole = at::zeros({x.size(0), w.width()}, x.options());
    whole.narrow(1, 0, w.columns).copy_(x);
    from = whole.const_data_ptr<float>();
  }
  const Tensor out = result_of(x, w.rows);
  multiply_floats(w, from, x.size(0), floats(bias, {w.rows}, "bias"), out.mutable_data_ptr<float>());
  return out;
}

Tensor packed_rows(const Tensor& data, IntArrayRef form, const Tensor& ids) {
  const Packed w = packed(data, form);
  TORCH_CHECK_VALUE(!w.paired && ids.dim() == 1 && ids.scalar_type() == at::kLong && ids.is_contiguous(),
                    "packed_rows takes ids [T] int64 and a weight that is not paired");
  const Tensor out = at::empty({ids.size(0), w.columns}, data.options().dtype(at::kFloat));
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.size(0); i++) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < w.rows, "ids must be in [0, ", w.rows, "), got ", id[i]);
    unpack_row(w, id[i], out.mutable_data_ptr<float>() + i * w.columns);
  }
  return out;
}

Tensor packed_project(const Tensor& x, const OptionalTensor& norm, double eps, const Tensor& data, IntArrayRef form,
                      const OptionalTensor& bias, IntArrayRef heads, const OptionalTensor& query_norm,
                      const OptionalTensor& key_norm, const OptionalTensor& cos, const OptionalTensor& sin) {
  const Packed w = packed(data, form);
  TORCH_CHECK_VALUE(x.dim() == 2 && !w.paired, "packed_project takes x [T, columns] and a weight that is not paired");
  TORCH_CHECK_VALUE(heads.size() == 3 && heads[0] >= 0 && heads[1] >= 0 && heads[2] >= 1 &&
                        heads[0] + heads[1] <= w.rows / heads[2],
                    "the weight's ", w.rows, " outputs do not hold the heads ", heads);
  const int64_t rows = x.size(0), rotated = cos ? cos->size(-1) : 0;
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value() && rotated % 2 == 0 && rotated <= heads[2],
                    "cos and sin have an even number of at most ", heads[2], " dimensions, got ", rotated);
  const float small = static_cast<float>(eps);
  const Projection p{{floats(norm, {w.columns}, "norm"), small}, w, floats(bias, {w.rows}, "bias"), heads[0], heads[1],
                     heads[2], {floats(query_norm, {heads[2]}, "query_norm"), small},
                     {floats(key_norm, {heads[2]}, "key_norm"), small}, floats(cos, {rows, 1, rotated}, "cos"),
                     floats(sin, {rows, 1, rotated}, "sin"), rotated};
  const Tensor out = result_of(x, w.rows);
  project(p, floats(x, {rows, w.columns}, "x"), rows, out.mutable_data_ptr<float>());
  return out;
}

Tensor packed_ending(const Tensor& x, const Tensor& attended, const Tensor& out_data, IntArrayRef out_form,
                     const OptionalTensor& out_bias, const OptionalTensor& out_norm, const Tensor& norm, double eps,
                     const Tensor& gate_up_data, IntArrayRef gate_up_form, const Tensor& down_data,
                     IntArrayRef down_form, const OptionalTensor& down_norm, bool gelu) {
  const Packed out = packed(out_data, out_form), gate_up = packed(gate_up_data, gate_up_form),
               down = packed(down_data, down_form);
  const int64_t size = out.rows;
  TORCH_CHECK_VALUE(!out.paired && gate_up.paired && !down.paired && gate_up.columns == size && down.rows == size &&
                        down.columns == gate_up.outputs() && x.dim() == 2,
                    "the weights of a layer do not belong together: ", out_form, ", ", gate_up_form, ", ", down_form);
  const float small = static_cast<float>(eps);
  const Ending e{out, floats(out_bias, {size}, "out_bias"), {floats(out_norm, {size}, "out_norm"), small},
                 {floats(norm, {size}, "norm"), small}, gate_up, gelu ? Gate::kGeluTanh : Gate::kSilu, down,
                 {floats(down_norm, {size}, "down_norm"), small}};
  const Tensor result = result_of(x, size);
  end_layer(e, floats(x, {x.size(0), size}, "x"), floats(attended, {x.size(0), out.columns}, "attended"), x.size(0),
            result.mutable_data_ptr<float>());
  return result;
}

// The parts of a layer, in the order in which they are given.
enum Extra { kNorm, kQkvBias, kQueryNorm, kKeyNorm, kOutBias, kOutNorm, kMlpNorm, kDownNorm, kExtras };
enum Step { kSlots, kTables, kStarts, kLengths, kSteps };
enum Open { kOpenKeys, kOpenValues, kOpenSlots, kOpenTables, kOpenStarts, kOpenLengths, kSources, kTargets, kOpens };

// What all layers have of something, of which layer `layer` has its share.
struct Layered {
  TensorList all;
  int64_t layers;
  TensorList of(int64_t layer) const {
    const int64_t count = static_cast<int64_t>(all.size()) / layers;
    return all.slice(layer * count, count);
  }
};

struct Cache {
  TensorList step, open;
  Layered key_planes, key_frames, value_planes, value_frames;
  IntArrayRef key_coding, value_coding;
  int64_t block_size;
  double scale;
  int64_t window;

  Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, int64_t layer) const {
    const TensorList keys = key_planes.of(layer), values = value_planes.of(layer);
    if (open.empty()) {
      write_tensors(keys[0], values[0], k, v, step[kSlots]);
      return attend_tensors(q, keys[0], values[0], step[kTables], step[kStarts], step[kLengths], scale,
                            window, 0);
    }
    const TensorList key_frame = key_frames.of(layer), value_frame = value_frames.of(layer);
    const Tensor &open_keys = open[kOpenKeys], &open_values = open[kOpenValues];
    write_tensors(open_keys, open_values, k, v, open[kOpenSlots].select(0, layer));
    if (open[kTargets].numel()) {
      const Tensor sources = open[kSources].select(0, layer);
      seal_tensors(open_keys, keys, key_coding, key_frame, true, sources, open[kTargets]);
      seal_tensors(open_values, values, value_coding, value_frame, false, sources, open[kTargets]);
    }
    const auto [own, lse] = attend_own_tensors(q, open_keys, open_values, open[kOpenTables].select(0, layer),
                                               open[kOpenStarts], open[kOpenLengths], scale, window, 0);
    return attend_coded_tensors(q, own, lse, keys, key_coding, key_frame, values, value_coding, value_frame,
                                step[kTables], step[kStarts], step[kLengths], block_size, scale, window, 0);
  }
};

Tensor packed_layers(const Tensor& x, TensorList weights, IntArrayRef forms, const c10::List<OptionalTensor>& extras,
                     IntArrayRef heads, double eps, double scale, bool gelu, const OptionalTensor& cos,
                     const OptionalTensor& sin, TensorList step, TensorList open, TensorList key_planes,
                     IntArrayRef key_coding, TensorList key_frames, TensorList value_planes, IntArrayRef value_coding,
                     TensorList value_frames, int64_t block_size, int64_t window) {
  const int64_t layers = static_cast<int64_t>(weights.size()) / 4;
  const auto shared = [&](TensorList all) { return all.size() % layers == 0; };
  TORCH_CHECK_VALUE(layers >= 1 && weights.size() % 4 == 0 && forms.size() == 20 &&
                        static_cast<int64_t>(extras.size()) == layers * kExtras && heads.size() == 3 &&
                        step.size() == kSteps && (open.empty() || open.size() == kOpens),
                    "packed_layers takes of each layer 4 weights and ", int{kExtras}, " extras, 20 numbers of forms, 3 "
                    "of heads, ", int{kSteps}, " tensors of the step and none or ", int{kOpens}, " of open blocks");
  TORCH_CHECK_VALUE(key_planes.size() >= weights.size() / 4 && value_planes.size() >= weights.size() / 4 &&
                        shared(key_planes) && shared(value_planes) && shared(key_frames) && shared(value_frames),
                    "packed_layers takes planes and frames of ", layers, " layers");
  for (const Open stacked : {kOpenSlots, kOpenTables, kSources})
    TORCH_CHECK_VALUE(open.empty() || (open[stacked].dim() >= 1 && open[stacked].size(0) == layers),
                      "slots, tables and sources of open blocks are those of ", layers, " layers");
  const Cache cache{step, open, {key_planes, layers}, {key_frames, layers}, {value_planes, layers},
                    {value_frames, layers}, key_coding, value_coding, block_size, scale, window};
  const auto form = [&](int64_t which) { return forms.slice(5 * which, 5); };
  const Team::Scope team;
  Tensor hidden = x;
  for (int64_t layer = 0; layer < layers; layer++) {
    const auto extra = [&](Extra which) -> OptionalTensor { return extras.get(layer * kExtras + which); };
    const TensorList own = weights.slice(4 * layer, 4);
    TORCH_CHECK_VALUE(extra(kMlpNorm).has_value(), "a layer's MLP has a norm");
    const Tensor qkv = packed_project(hidden, extra(kNorm), eps, own[0], form(0), extra(kQkvBias), heads,
                                      extra(kQueryNorm), extra(kKeyNorm), cos, sin);
    TORCH_CHECK_VALUE(qkv.size(1) == (heads[0] + 2 * heads[1]) * heads[2],
                      "the first weight of a layer gives q, k and v");
    const Tensor by_head = qkv.unflatten(1, {-1, heads[2]}), q = by_head.narrow(1, 0, heads[0]),
                 k = by_head.narrow(1, heads[0], heads[1]), v = by_head.narrow(1, heads[0] + heads[1], heads[1]);
    const Tensor attended = cache.attend(q, k, v, layer);
    hidden = packed_ending(hidden, attended.flatten(1), own[1], form(1), extra(kOutBias), extra(kOutNorm),
                           *extra(kMlpNorm), eps, own[2], form(2), own[3], form(3), extra(kDownNorm), gelu);
  }
  return hidden;
}

}  // namespace

TORCH_LIBRARY_IMPL(KVIST_NAMESPACE, CPU, library) {
  library.impl("packed_linear", &packed_linear);
  library.impl("packed_float", &packed_float);
  library.impl("packed_rows", &packed_rows);
  library.impl("packed_project", &packed_project);
  library.impl("packed_ending", &packed_ending);
  library.impl("packed_layers", &packed_layers);
}

}  // namespace kvist
