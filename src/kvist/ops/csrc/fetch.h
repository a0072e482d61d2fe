// Memory that is read soon is brought into the second-level cache while something else is worked on.
#pragma once

#include <algorithm>

#include "batch.h"
#include "vec.h"

namespace kvist {

// What one side of a split reads, keys or values: pieces of memory, in the order in which they are read.
struct Reads {
  struct Piece {
    const char* first;
    int64_t bytes;
  };

  int64_t count = 0, bytes = 0;
  Piece pieces[2 * kSplit / kLanes];  // of each block, codes and scales

  void add(const void* first, int64_t size) {
    pieces[count++] = {static_cast<const char*>(first), size};
    bytes += size;
  }
};

// While one side is worked on, the other is fetched: during the two products, and in the rest of the time in between.
constexpr float kFetchedInProduct = 0.7f;

// A core has few lines under way at once, and stalls when it asks for more. So lines are asked for one by one, evenly
// over the work: each part of it says what is its share, and in how many ticks it will ask for it.
class Fetcher {
 public:
  explicit Fetcher(const Reads& reads)
      : piece_(reads.pieces), end_(reads.pieces + reads.count), bytes_(static_cast<float>(reads.bytes)) {
    begin();
  }

  // The next `ticks` ticks ask for so much of everything, at most a line each.
  void pace(float share, int64_t ticks) {
    const float bytes = share * bytes_ / static_cast<float>(std::max<int64_t>(1, ticks));
    if (piece_ < end_) step_ = std::min(kLine, static_cast<int64_t>(bytes) + 1);
  }

  void tick() {
    prefetch(at_);
    at_ += step_;
    if (at_ >= last_) {
      piece_++;
      begin();
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  void begin() {
    if (piece_ < end_) {
      at_ = piece_->first;
      last_ = at_ + piece_->bytes;
    } else {  // from now on ticks ask for what is here anyway
      at_ = reinterpret_cast<const char*>(this);
      last_ = at_ + 1;
      step_ = 0;
    }
  }

  const Reads::Piece* piece_;
  const Reads::Piece* const end_;
  const float bytes_;
  const char* at_;
  const char* last_;
  int64_t step_ = 0;
};

}  // namespace kvist
