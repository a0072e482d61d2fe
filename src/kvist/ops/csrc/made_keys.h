// Keys that are no stream of their own: latents with what stands behind them, or values that are also keys. They are
// made for sixteen tokens at a time, in float, and multiplied with all rows.
#pragma once

#include "attend_coded.h"
#include "attention.h"
#include "vectors.h"

namespace kvist {

class MadeKeys : public Keys {
 public:
  explicit MadeKeys(const AttendMadeCall& call);

  void load_queries(const Group& group, float* queries) const override;
  void score(const Split& split, int64_t head, const float* queries, float* scores, Fetcher& fetcher) const override;
  int64_t head_bytes() const override { return values_.head_bytes(); }
  // What stands behind the values is small, and comes as it is needed.
  void add_reads(const Group& group, int64_t token, Reads& reads) const override;

 private:
  void make(const Group& group, int64_t head, int64_t token, Lanes* keys) const;
  void tie(int64_t position, Lanes* keys) const;
  void enter(int64_t head, int64_t count, float* queries) const;

  const Batch& batch_;
  const Vectors values_;
  const std::optional<Vectors> behind_;
  const std::optional<Tie> tie_;
  const int64_t width_;  // of a row of queries
};

}  // namespace kvist
