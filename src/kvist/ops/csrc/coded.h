// Keys and values as codes. Every product is of whole numbers, exact in any order; what is float has one order per row.
#pragma once

#include <vector>

#include "attention.h"
#include "buffer.h"
#include "bytes.h"
#include "frame.h"

namespace kvist {

// The group's heads in the block that holds the token.
inline Heads block_of(const Batch& batch, const CodedStream& stream, const Group& group, int64_t token) {
  const int64_t bytes = stream.coding.code_bytes(batch.block_size);
  return {stream.codes + (batch.block(group, token) * batch.heads + group.head) * bytes, bytes};
}

// Queries enter the keys' frame and become whole numbers once per call: 8 bits, and 16 for keys of 8 bits, so that
// their rounding is far below that of the keys.
class CodedKeys : public Keys {
 public:
  CodedKeys(const Batch& batch, const CodedStream& stream);

  void load_queries(const Group&, float*) const override {}
  void score(const Split& split, const float* queries, float* scores, Fetcher& fetcher) const override;
  Heads block(const Group& group, int64_t token) const override { return block_of(batch_, stream_, group, token); }

  // What the scores of a row, as `each_row` counts them, lack because the keys have lost their mean: q.mean, scaled.
  float lost(const Group& group, int64_t row) const;

 private:
  struct Part {  // one segment's side of the queries
    int64_t digits;
    Levels levels;
    Buffer<uint8_t> scalars;  // [heads, rows, digits, dims]
    Buffer<int32_t> start;    // [heads, rows, digits]: what makes up for the 128 in unsigned levels
    Buffer<float> scale;      // [heads, rows]
  };

  void load_rows(int64_t first, int64_t count);
  void quantize(const Lanes* x, int64_t dims, Part& part, const int64_t* rows, int64_t count) const;
  void add_scores(const Split& split, int64_t key, int64_t head, int64_t segment, float* scores,
                  Fetcher& fetcher) const;

  const Batch& batch_;
  const CodedStream stream_;
  const int64_t rows_;  // of one head
  std::vector<Part> parts_;
  Buffer<float> lost_;  // [heads, rows]
};

// Weights times the tokens' scales become whole numbers of 16 bits for each row, segment and block, so that the tail of
// a peaked softmax survives.
class CodedValues : public Values {
 public:
  CodedValues(const Batch& batch, const CodedStream& stream);

  void soften(float* scores, int64_t seen, float* state) const override;
  void weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const override;
  Heads block(const Group& group, int64_t token) const override { return block_of(batch_, stream_, group, token); }

 private:
  struct Weighed;
  void spoil(const Split& split, float* states) const;
  void add_values(const Weighed& weighed, int64_t id, int64_t segment, int64_t row, int64_t rows, bool fresh,
                  float* states, Fetcher& fetcher) const;

  const Batch& batch_;
  const CodedStream stream_;
  const float scale_;
  const State state_;
  std::vector<Levels> levels_;
};

}  // namespace kvist
