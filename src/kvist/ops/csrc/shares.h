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
  Shares(int64_t tasks, int64_t threads) { deal(tasks, threads); }

  // Anew, while nobody takes any.
  void deal(int64_t tasks, int64_t threads) {
    if (threads > most_) left_.reset(new std::atomic<Range>[most_ = threads]);
    threads_ = threads;
    const auto border = [=](int64_t thread) { return static_cast<int32_t>(tasks * thread / threads); };
    for (int64_t i = 0; i < threads; i++) left_[i] = Range{border(i), border(i + 1)};
  }

  // The index of the next task of a thread, or -1 when none is left.
  int64_t take(int64_t thread) {
    const Range taken = take(thread, [](int32_t) { return 1; });
    return taken.count() ? taken.first : -1;
  }

  struct Range {
    int32_t first, end;
    int32_t count() const { return end - first; }
  };

  // Half of what is left of a thread's share, so that it comes back for ever less; none when nothing is left.
  Range take_half(int64_t thread) {
    return take(thread, [](int32_t left) { return (left + 1) / 2; });
  }

 private:
  template <class Size>
  Range take(int64_t thread, Size size) {
    for (Range mine = left_[thread]; mine.count() > 0;) {
      const int32_t border = mine.first + size(mine.count());
      if (left_[thread].compare_exchange_weak(mine, {border, mine.end})) return {mine.first, border};
    }
    for (;;) {
      int64_t other = 0;
      Range most = left_[0];
      for (int64_t i = 1; i < threads_; i++) {
        const Range range = left_[i];
        if (range.count() > most.count()) other = i, most = range;
      }
      if (most.count() <= 0) return {0, 0};
      const int32_t border = most.end - size(most.count());
      if (left_[other].compare_exchange_weak(most, {most.first, border})) return {border, most.end};
    }
  }

  int64_t threads_ = 0, most_ = 0;
  std::unique_ptr<std::atomic<Range>[]> left_;
};

}  // namespace kvist
