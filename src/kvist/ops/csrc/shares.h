// Which thread does which task.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace kvist {

// Each thread has a share of adjoining tasks and does it from front to back, so that it reads memory in the order in
// which it lies. Who is done helps whoever has most left, with the last of that.
class Shares {
 public:
  Shares(int64_t tasks, int64_t threads) : threads_(threads), left_(new std::atomic<Range>[threads]) {
    const auto border = [=](int64_t thread) { return static_cast<int32_t>(tasks * thread / threads); };
    for (int64_t i = 0; i < threads; i++) left_[i] = Range{border(i), border(i + 1)};
  }

  // The index of the next task of a thread, or -1 when none is left.
  int64_t take(int64_t thread) {
    for (Range mine = left_[thread]; mine.count() > 0;)
      if (left_[thread].compare_exchange_weak(mine, {mine.first + 1, mine.end})) return mine.first;
    for (;;) {
      int64_t other = 0;
      Range most = left_[0];
      for (int64_t i = 1; i < threads_; i++) {
        const Range range = left_[i];
        if (range.count() > most.count()) other = i, most = range;
      }
      if (most.count() <= 0) return -1;
      if (left_[other].compare_exchange_weak(most, {most.first, most.end - 1})) return most.end - 1;
    }
  }

 private:
  struct Range {
    int32_t first, end;
    int32_t count() const { return end - first; }
  };

  const int64_t threads_;
  const std::unique_ptr<std::atomic<Range>[]> left_;
};

}  // namespace kvist
