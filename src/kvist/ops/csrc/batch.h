// The ragged batch that attention is called with: whose rows, what they see, and in which blocks that lies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "number.h"

namespace kvist {

constexpr int64_t kSplit = 512;  // tokens from one cut of a sequence to the next
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kGroupRows = 48;  // of one KV head that are worked on together, at most

struct Group {
  int64_t sequence;
  int64_t head, heads;      // KV heads
  int64_t first_row, rows;  // of each; token-major: row = token * query heads per KV head + query head
  int64_t first_split, splits;  // those before the first are outside of all windows
  int64_t kept = -1;  // where its partial results begin, in rows, when its splits are tasks of their own

  int64_t all_rows() const { return heads * rows; }
};

struct Batch {
  const void* q;  // [T, query_heads, key_dim], rows q_stride apart
  int64_t q_stride;
  Number q_type;
  int64_t query_heads, heads, block_size;
  int64_t head_dim, key_dim;  // of values and what comes of them, and of keys and queries

  const int32_t* tables;  // [sequences, table_stride]
  int64_t table_stride;
  const int32_t* starts;   // [sequences + 1]
  const int32_t* lengths;  // [sequences]
  int64_t sequences;

  double scale;
  bool whole_blocks;  // a query sees the blocks before its own, not the tokens up to its own
  int64_t window;     // a query sees so many tokens up to its own at most; 0: all
  double softcap;     // scores s become softcap * tanh(s / softcap); 0: they stay

  int64_t queries(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
  int64_t heads_per_kv() const { return query_heads / heads; }
  int64_t rows() const { return starts[sequences] * heads_per_kv(); }  // of one KV head
  // Maxima and exponents are binary.
  float binary_scale() const { return static_cast<float>(scale * 1.4426950408889634); }

  float binary_softcap() const { return static_cast<float>(softcap * 1.4426950408889634); }

  // How many tokens of its sequence the query at a position sees.
  int64_t seen(int64_t position) const { return whole_blocks ? position / block_size * block_size : position + 1; }

  // The first of them.
  int64_t oldest(int64_t position) const { return window ? std::max<int64_t>(0, position + 1 - window) : 0; }

  // The same for a row of any head of the group.
  int64_t position(const Group& group, int64_t row) const {
    const int64_t query = (group.first_row + row) / heads_per_kv();
    return lengths[group.sequence] - queries(group.sequence) + query;
  }
  int64_t seen(const Group& group, int64_t row) const { return seen(position(group, row)); }
  int64_t oldest(const Group& group, int64_t row) const { return oldest(position(group, row)); }

  int64_t block(const Group& group, int64_t token) const {
    return tables[group.sequence * table_stride + token / block_size];
  }

  // Calls f(token, query head, index in the group) for each row of each head.
  template <class F>
  void each_row(const Group& group, F f) const {
    for (int64_t head = 0; head < group.heads; head++) {
      for (int64_t row = 0; row < group.rows; row++) {
        const int64_t token = starts[group.sequence] + (group.first_row + row) / heads_per_kv();
        const int64_t query_head = (group.head + head) * heads_per_kv() + (group.first_row + row) % heads_per_kv();
        f(token, query_head, head * group.rows + row);
      }
    }
  }
};

}  // namespace kvist
