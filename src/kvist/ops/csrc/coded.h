// Keys and values as codes. Every product is of whole numbers, exact in any order; what is float has one order per row.
#pragma once

#include <vector>

#include "attention.h"
#include "buffer.h"
#include "bytes.h"
#include "frame.h"

namespace kvist {

// Bytes of one head in one block, of both planes.
inline int64_t head_bytes_of(const Batch& batch, const CodedStream& stream) {
  return stream.coding.code_bytes(batch.block_size) + stream.coding.count() * batch.block_size * sizeof(Float16);
}

// Adds what is read of the group's heads in the block that holds the token.
inline void add_block(const Batch& batch, const CodedStream& stream, const Group& group, int64_t token, Reads& reads) {
  const int64_t codes = stream.coding.code_bytes(batch.block_size), scales = stream.coding.count() * batch.block_size;
  const int64_t first = batch.block(group, token) * batch.heads + group.head;
  reads.add(stream.codes + first * codes, group.heads * codes);
  reads.add(stream.scales + first * scales, group.heads * scales * sizeof(Float16));
}

// Queries enter the keys' frame and become whole numbers once per call: 8 bits, and 16 for keys of 8 bits, so that
// their rounding is far below that of the keys.
class CodedKeys : public Keys {
 public:
  CodedKeys(const Batch& batch, const CodedStream& stream);

  void load_queries(const Group&, float*) const override {}
  void score(const Split& split, int64_t head, const float* queries, float* scores, Fetcher& fetcher) const override;
  int64_t head_bytes() const override { return head_bytes_of(batch_, stream_); }
  void add_reads(const Group& group, int64_t token, Reads& reads) const override {
    add_block(batch_, stream_, group, token, reads);
  }

  // What the scores of a row, as `each_row` counts them, lack because the keys have lost their mean: q.mean, scaled.
  float lost(const Group& group, int64_t row) const;

 private:
  struct Part {  // one segment's side of the queries
    int64_t digits;
    Levels levels;
    Buffer<uint8_t> scalars;  // [heads, rows, digits, dims]
    Buffer<int32_t> start;    // [heads, rows, digits]: what makes up for kByteOffset in levels
    Buffer<float> scale;      // [heads, rows]
  };

  void load_rows(int64_t first, int64_t count);
  void quantize(const Lanes* x, int64_t dims, Part& part, const int64_t* rows, int64_t count) const;
  void add_scores(const Split& split, int64_t head, int64_t segment, float* scores, Fetcher& fetcher) const;

  const Batch& batch_;
  const CodedStream stream_;
  const int64_t rows_;  // of one head
  std::vector<Part> parts_;
  Buffer<float> lost_;  // [heads, rows]
};

// Weights times the tokens' scales become whole numbers of 16 bits for each row, segment and split, so that the tail of
// a peaked softmax survives.
class CodedValues : public Values {
 public:
  CodedValues(const Batch& batch, const CodedStream& stream);

  void soften(float* scores, int64_t hidden, int64_t seen, float* state, Fetcher& fetcher) const override;
  void weigh(const Split& split, float* weights, float* states, Fetcher& fetcher) const override;
  int64_t head_bytes() const override { return head_bytes_of(batch_, stream_); }
  void add_reads(const Group& group, int64_t token, Reads& reads) const override {
    add_block(batch_, stream_, group, token, reads);
  }

 private:
  struct Weighed;
  void scale_weights(const Split& split, int64_t head, int64_t segment, const float* weights, float* states,
                     Weighed& weighed, Fetcher& fetcher) const;
  void add_values(const Split& split, int64_t head, int64_t segment, Weighed& weighed, Fetcher& fetcher) const;
  void store_sums(const Split& split, int64_t head, int64_t segment, const Weighed& weighed, float* states) const;

  const Batch& batch_;
  const CodedStream stream_;
  const Softening softening_;
  const State state_;
  std::vector<Levels> levels_;
};

}  // namespace kvist
