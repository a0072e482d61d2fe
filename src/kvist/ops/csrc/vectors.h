// The vectors of a stream as numbers, sixteen tokens at a time, one to a lane: out of their planes, codes and frame.
#pragma once

#include "attend_coded.h"
#include "bytes.h"
#include "fetch.h"
#include "frame.h"

namespace kvist {

class Vectors {
 public:
  // `keys`: whether its planes lie as those of keys do.
  Vectors(const StreamPlanes& stream, bool keys, int64_t block_size, int64_t dims);

  // x[i]: number i of tokens [token, token + 16) of one head of one block. `id`: of the head in the block, as planes
  // count them; `token`: within the block, a multiple of sixteen.
  void read(int64_t id, int64_t head, int64_t token, Lanes* x) const;

  // The same, left in the frame, if the stream has one; its products with what `enter` has put there are the same.
  void read_framed(int64_t id, int64_t token, Lanes* x) const;
  void enter(int64_t head, Lanes* x) const;
  bool coded() const { return stream_.coded.has_value(); }

  int64_t head_bytes() const;  // in one block
  void add_reads(int64_t id, int64_t heads, Reads& reads) const;

 private:
  template <class T>
  void read_plane(const T* block, int64_t token, Lanes* x) const;

  const StreamPlanes stream_;
  const bool keys_;
  const int64_t block_size_, dims_;
  std::vector<Levels> levels_;
};

}  // namespace kvist
