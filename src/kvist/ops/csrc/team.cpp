#include "team.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvist {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// A helper waits for the next job so long before it sleeps: longer than what lies between two jobs of a step.
constexpr nanoseconds kBetweenJobs = microseconds(100);
// The leader waits so long for who is still at work, before it sleeps: to wake up takes a fraction of it.
constexpr nanoseconds kForHelpers = microseconds(200);
// Both, beside others: what is over sooner needs no sleep.
constexpr nanoseconds kBeside = microseconds(2);
// When quiet is looked for again: first and most. Twice as late as the last time where it held for less than that, or
// less than a few time slices, which is how long a core is kept beside somebody who always wants it.
constexpr nanoseconds kFirstRetry = milliseconds(10), kLastRetry = milliseconds(1000), kSlices = milliseconds(20);

constexpr uint64_t kTurn = uint64_t{1} << 32;
constexpr uint64_t inside(uint64_t door) { return door & (kTurn - 1); }
constexpr bool open(uint64_t door) { return door & kTurn; }

thread_local Team::Place here = Team::Place::kOutside;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `done` came true before so much time had passed.
template <class Done>
bool spin(nanoseconds most, Done done) {
  constexpr int kTurns = 32;  // between two looks at the clock
  for (auto end = std::chrono::steady_clock::time_point::max();;) {
    for (int i = 0; i < kTurns; i++) {
      if (done()) return true;
      pause();
    }
    const auto now = std::chrono::steady_clock::now();
    if (end == std::chrono::steady_clock::time_point::max()) end = now + most;
    if (now >= end) return done();
  }
}

// The process's team; never destroyed, as its threads use it until the process ends.
std::atomic<Team*> current{nullptr};

// A child of fork has none of the threads: it makes a team of its own.
void forget() {
  current = nullptr;
  here = Team::Place::kOutside;
}

}  // namespace

Team& Team::instance() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget);
  static_cast<void>(registered);
  Team* team = current.load(std::memory_order_acquire);
  if (!team) {
    Team* fresh = new Team;
    if (current.compare_exchange_strong(team, fresh)) return *fresh;
    delete fresh;
  }
  return *team;
}

Team::Scope::Scope() : team_(nullptr) {
  if (here != Place::kOutside) return;
  Team& team = instance();
  if (team.led_.exchange(true, std::memory_order_acquire)) return;
  team_ = &team;
  here = Place::kLeads;
}

Team::Scope::~Scope() {
  if (!team_ || team_ != current.load(std::memory_order_relaxed)) return;
  here = Place::kOutside;
  team_->led_.store(false, std::memory_order_release);
}

Team::Place Team::place() { return here; }

int64_t Team::lost() { return instance().lost_; }

void Team::run(int64_t count, int64_t threads, Work work, const void* f) {
  instance().share(count, threads, work, f);
}

void Team::share(int64_t count, int64_t threads, Work work, const void* f) {
  const int64_t most = std::min(threads, count);
  add_threads(most - 1);
  work_ = work;
  f_ = f;
  wanted_ = std::min(most - 1, helpers_);
  shares_.deal(count, wanted_ + 1);
  failed_.store(false, std::memory_order_relaxed);
  error_ = nullptr;
  door_.fetch_add(kTurn, std::memory_order_release);
  bell_.fetch_add(1, std::memory_order_release);
  bell_.notify_all();  // no more than a look at a counter where nobody sleeps
  here = Place::kWithin;
  take_part(0);
  here = Place::kLeads;
  close();
  if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(error_);
}

// Works until nothing is left to take.
void Team::take_part(int64_t index) {
  for (auto part = shares_.take_half(index); part.count(); part = shares_.take_half(index)) {
    try {
      work_(f_, part.first, part.end);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
}

// Shuts the door, and waits for those inside.
void Team::close() {
  const auto empty = [&] { return inside(door_.load(std::memory_order_acquire)) == 0; };
  door_.fetch_add(kTurn, std::memory_order_acq_rel);
  const Clock::time_point start = Clock::now();
  if (busy_.load(std::memory_order_relaxed) && start >= until_) {
    busy_.store(false, std::memory_order_relaxed);
    since_ = start;
  }
  if (spin(patience(kForHelpers), empty)) return;
  if (!busy_.load(std::memory_order_relaxed)) note_lost();
  for (uint32_t seen = left_.load(); !empty(); seen = left_.load()) {
    // Between the look at the number and that at the door the last one may have left: then the number has changed.
    left_.wait(seen);
  }
}

nanoseconds Team::patience(nanoseconds quiet) const { return busy_.load(std::memory_order_relaxed) ? kBeside : quiet; }

void Team::note_lost() {
  const Clock::time_point now = Clock::now();
  lost_.fetch_add(1, std::memory_order_relaxed);
  retry_ = now - since_ < std::max(kSlices, retry_) ? std::min(retry_ * 2, kLastRetry) : kFirstRetry;
  until_ = now + retry_;
  busy_.store(true, std::memory_order_relaxed);
}

void Team::add_threads(int64_t count) {
  if (helpers_ >= count) return;
  sigset_t all, before;  // signals are for the threads that handle them
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (; helpers_ < count; helpers_++) std::thread([this, index = helpers_ + 1] { help(index); }).detach();
  } catch (const std::system_error&) {
    // There are no more threads to be had: those that are there do the work.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Team::help(int64_t index) {
  here = Place::kWithin;
  uint64_t last = door_.load(std::memory_order_acquire) / kTurn;
  if (last % 2) last--;  // the job for which this thread was made is still to come, or is open already
  for (;;) {
    const uint32_t bell = bell_.load(std::memory_order_acquire);
    uint64_t door = 0;
    const auto new_job = [&] {
      door = door_.load(std::memory_order_acquire);
      return open(door) && door / kTurn != last;
    };
    if (!spin(patience(kBetweenJobs), new_job)) {
      bell_.wait(bell, std::memory_order_acquire);
      continue;
    }
    if (!door_.compare_exchange_strong(door, door + 1, std::memory_order_acq_rel)) continue;
    last = door / kTurn;
    if (index <= wanted_) take_part(index);
    door = door_.fetch_sub(1, std::memory_order_acq_rel);
    if (inside(door) == 1 && !open(door)) {
      left_.fetch_add(1, std::memory_order_release);
      left_.notify_one();
    }
  }
}

}  // namespace kvist

