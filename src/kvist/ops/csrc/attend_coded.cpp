#include "attend_coded.h"

#include "dense.h"
#include "made_keys.h"
#include "results.h"

namespace kvist {
namespace {

std::unique_ptr<Values> values_of(const Batch& batch, const StreamPlanes& stream) {
  if (stream.coded) return std::make_unique<CodedValues>(batch, *stream.coded);
  return dense_values(batch, stream.plane, stream.type);
}

const CodedStream* coded(const StreamPlanes& stream) { return stream.coded ? &*stream.coded : nullptr; }

}  // namespace

void attend_coded(const AttendCodedCall& call) {
  const Batch& batch = call.batch;
  const auto coded_keys = call.keys.coded ? std::make_unique<CodedKeys>(batch, *call.keys.coded) : nullptr;
  const auto dense = coded_keys ? nullptr : dense_keys(batch, call.keys.plane, call.keys.type);
  const Keys& keys = coded_keys ? static_cast<const Keys&>(*coded_keys) : *dense;
  const Merged result(batch, coded(call.values), coded_keys.get(), {call.own, call.lse},
                      {call.out, batch.q_type, nullptr});
  Attention(batch, keys, *values_of(batch, call.values), result).run();
}

void attend_made(const AttendMadeCall& call) {
  const Batch& batch = call.batch;
  const MadeKeys keys(call);
  const auto values = values_of(batch, call.values);
  const Output output{call.out, Number::kFloat32, call.out_lse};
  if (call.own)
    Attention(batch, keys, *values, Merged(batch, coded(call.values), nullptr, {call.own, call.lse}, output)).run();
  else
    Attention(batch, keys, *values, Normalized(batch, output)).run();
}

}  // namespace kvist
