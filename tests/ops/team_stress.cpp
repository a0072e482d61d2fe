// Drives the team of threads alone: every number of every job is done once, whatever happens beside it. Prints what it
// did; a check that fails ends it with 1. Compiled by test_team.py with team.cpp, with the thread sanitizer and without.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "team.h"

using kvist::Team;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

template <class F>
void share(int64_t count, int64_t threads, const F& f) {
  Team::run(count, threads,
            [](const void* one, int64_t begin, int64_t end) { (*static_cast<const F*>(one))(begin, end); }, &f);
}

// Jobs of many sizes; returns how many threads took part in any of them.
int64_t jobs(int64_t number, int64_t threads) {
  std::atomic<int64_t> seen{0};
  thread_local bool counted;
  counted = false;
  for (int64_t job = 0; job < number; job++) {
    const int64_t count = 2 + job * 7 % 61;
    std::vector<int> done(count);  // written without a lock: each number is one thread's
    share(count, threads, [&](int64_t begin, int64_t end) {
      if (!counted) counted = true, seen++;
      require(Team::place() == Team::Place::kWithin, "a part is within");
      for (int64_t i = begin; i < end; i++) done[i]++;
    });
    for (int one : done) require(one == 1, "each number is done once");
    if (job % 97 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // helpers fall asleep
  }
  return seen;
}

void errors(int64_t threads) {
  for (int64_t job = 0; job < 200; job++) {
    std::atomic<int64_t> inside{0};
    bool caught = false;
    try {
      share(16, threads, [&](int64_t begin, int64_t end) {
        inside++;
        const bool mine = begin <= job % 16 && job % 16 < end;
        inside--;
        if (mine) throw std::runtime_error("as asked");
      });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "as asked";
    }
    require(caught && inside == 0, "an exception comes to the leader, after all have ended");
  }
}

// Only one thread leads; another's work stays outside until it does.
void leaders() {
  const Team::Scope mine;
  require(Team::place() == Team::Place::kLeads, "who comes first leads");
  std::thread([] {
    const Team::Scope other;
    require(Team::place() == Team::Place::kOutside, "who comes second does not");
  }).join();
  const Team::Scope nested;
  require(Team::place() == Team::Place::kLeads, "a scope within a scope changes nothing");
}

void forks() {
  {
    const Team::Scope scope;
    jobs(50, 3);
  }
  const pid_t child = fork();
  if (child == 0) {
    const Team::Scope scope;
    if (Team::place() != Team::Place::kLeads) std::_Exit(3);
    jobs(50, 3);
    std::_Exit(7);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 7, "a child of fork has a team of its own");
}

// A helper that is held up within a part is waited for, and noticed.
void held_up() {
  const Team::Scope scope;
  const int64_t before = Team::lost();
  std::atomic<bool> helps{false};
  for (int tries = 0; tries < 1000 && !helps; tries++) {
    const auto leader = std::this_thread::get_id();
    share(2, 2, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() == leader) {
        for (int i = 0; i < 200 && !helps; i++) std::this_thread::sleep_for(std::chrono::microseconds(50));
      } else {
        helps = true;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    });
  }
  require(helps, "a helper takes part");
  require(Team::lost() > before, "a long wait is noticed");
  jobs(300, 2);  // beside others now: every wait a sleep
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  jobs(300, 2);  // and quiet again
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t number = argc > 1 ? std::atoll(argv[1]) : 2000;
  int64_t most = 0;
  for (int64_t threads : {2, 3, 8, 2}) {
    const Team::Scope scope;
    require(Team::place() == Team::Place::kLeads, "the leader leads");
    most = std::max(most, jobs(number, threads));
    errors(threads);
  }
  require(Team::place() == Team::Place::kOutside, "after a scope nothing is left of it");
  leaders();
  held_up();
  if (argc <= 2) forks();
  std::printf("at most %lld threads\n", static_cast<long long>(most));
  return most >= 2 ? 0 : 1;
}
