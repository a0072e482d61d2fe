// Work shared between threads: a team of our own where this thread leads it (team.h), PyTorch's otherwise. Who does what
// changes no bit.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace kvist {

inline int64_t thread_count() { return at::get_num_threads(); }

// f(begin, end) over parts of [0, count) that cover it, of at least `grain`, on several threads.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  const Team::Place place = Team::place();
  if (place == Team::Place::kOutside) return at::parallel_for(0, count, grain, f);
  const int64_t threads = thread_count(), units = count / std::max<int64_t>(1, grain);
  if (place == Team::Place::kWithin || threads <= 1 || units <= 1) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  const auto work = [&](int64_t begin, int64_t end) { f(count * begin / units, count * end / units); };
  Team::run(units, threads,
            [](const void* one, int64_t begin, int64_t end) { (*static_cast<decltype(work)*>(one))(begin, end); },
            &work);
}

}  // namespace kvist
