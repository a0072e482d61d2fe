// Threads of our own, for operators that share one piece of work after another: a step through all layers does so some
// hundred times. PyTorch's threads (OpenMP) get equal shares and wait for each other by spinning, all of them, so where
// another program has the core of one, the others spin away the time slice that it waits for.
//
// Here work is taken part by part by whoever is there, and nobody is waited for who has not begun. Waiting is by
// spinning while that pays; once somebody who had begun was waited for longer than any part takes, his core was taken
// from him: from then on a wait is a sleep, which gives the core to whoever can use it, until a while has been quiet.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>

#include "shares.h"

namespace kvist {

class Team {
 public:
  using Work = void (*)(const void* f, int64_t begin, int64_t end);

  // While one stands, `parallel_for` of this thread shares its work with the team, where no other thread has it.
  class Scope {
   public:
    Scope();
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Team* team_;
  };

  // What `parallel_for` of this thread is to do.
  enum class Place { kOutside, kLeads, kWithin };
  static Place place();

  // work(f, begin, end) for parts of [0, count) that cover it, at most `threads` at once, the caller's among them. The
  // team is the caller's: it has a Scope. Rethrows the first exception of a part, after all that had begun have ended.
  static void run(int64_t count, int64_t threads, Work work, const void* f);

  // Waits that showed that a thread had lost its core, since the process began.
  static int64_t lost();

 private:
  using Clock = std::chrono::steady_clock;

  Team() = default;
  static Team& instance();
  void share(int64_t count, int64_t threads, Work work, const void* f);
  void help(int64_t index);
  void take_part(int64_t index);
  void add_threads(int64_t count);
  void close();
  std::chrono::nanoseconds patience(std::chrono::nanoseconds quiet) const;
  void note_lost();

  std::atomic<bool> led_{false};
  int64_t helpers_ = 0;  // threads beside the leader's

  // The job: written by the leader while the door is shut and nobody is inside.
  Work work_ = nullptr;
  const void* f_ = nullptr;
  int64_t wanted_ = 0;  // helpers that may take part
  Shares shares_{0, 1};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // whoever sets failed_ writes it

  // How many jobs were opened and shut, in the upper half: odd while one is open. How many helpers are inside, in the
  // lower. One number, as nobody may enter what is shut.
  alignas(64) std::atomic<uint64_t> door_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};  // changes when a job is opened; helpers sleep on it
  alignas(64) std::atomic<uint32_t> left_{0};  // changes when the last helper leaves; the leader sleeps on it
  alignas(64) std::atomic<bool> busy_{false};  // beside others that want our cores
  Clock::time_point until_{}, since_{};        // when to try again whether it is quiet; since when it is
  std::chrono::nanoseconds retry_{0};
  std::atomic<int64_t> lost_{0};
};

}  // namespace kvist
