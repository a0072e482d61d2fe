// What becomes of rows that have seen all their keys: divided by their sums and, where they have more keys elsewhere,
// merged with what those gave.
#pragma once

#include "attention.h"
#include "coded.h"

namespace kvist {

// Where results go. `lse` [T, query_heads]: log2 of the sum of exp of the scaled scores; or null.
struct Output {
  void* out;  // [T, query_heads, head_dim], contiguous
  Number type;
  float* lse;
};

class Normalized : public Result {
 public:
  Normalized(const Batch& batch, const Output& output) : batch_(batch), output_(output), state_(batch.head_dim) {}

  void finish(const Group& group, const float* states) const override;

 private:
  const Batch& batch_;
  const Output output_;
  const State state_;
};

// Attention over each row's own block: `out` [T, query_heads, head_dim], `lse` as `Output` has it.
struct Own {
  const float* out;
  const float* lse;
};

// Divides by the sums, leaves the values' frame, and adds each row's own block. `values`: null where they are not coded;
// `keys`: null where scores lack nothing.
class Merged : public Result {
 public:
  Merged(const Batch& batch, const CodedStream* values, const CodedKeys* keys, const Own& own, const Output& output)
      : batch_(batch), values_(values), keys_(keys), own_(own), output_(output), state_(batch.head_dim) {}

  void finish(const Group& group, const float* states) const override;

 private:
  void leave_frame(const Group& group, int64_t row, int64_t count, const float* states,
                   float (*sealed)[kMaxHeadDim]) const;
  void merge(int64_t index, const float* sealed, float sealed_sum) const;

  const Batch& batch_;
  const CodedStream* values_;
  const CodedKeys* keys_;
  const Own own_;
  const Output output_;
  const State state_;
};

}  // namespace kvist
