// SPDX-License-Identifier: Apache-2.0
// Threads of the library's own.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"

namespace m2n {

inline Error no_thread(const std::string& name, const std::string& why) {
  return Error(Failure::kSetup, "cannot start the thread " + name + ": " + why +
                                    "; is the limit of threads (ulimit -u, or pids.max of the cgroup) too low?");
}

// Calls body() until it returns. One that throws, as where there is no memory at this moment, is called again a moment
// later: no thread of the library's own ends the process, or leaves its work undone.
template <class Body>
void outlive(const char* name, Body& body) {
  constexpr unsigned int kRestUs = 10'000;
  for (bool has_said = false;; has_said = true) {
    try {
      return body();
    } catch (const std::exception& error) {
      if (!has_said) std::fprintf(stderr, "m2n: the thread %s failed and goes on: %s\n", name, error.what());
    }
    usleep(kRestUs);
  }
}

// Runs body() on a thread of that name (at most 15 characters), as outlive() does. Signals of the operating system
// belong to the program's threads. Throws Error(kSetup) where there can be no more threads.
template <class Body>
std::thread start_own_thread(const char* name, Body&& body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  std::string failure;
  try {
    thread = std::thread([name, body = std::forward<Body>(body)]() mutable {
      pthread_setname_np(pthread_self(), name);
      outlive(name, body);
    });
  } catch (const std::system_error& error) {
    failure = error.what();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failure.empty()) return thread;
  throw no_thread(name, failure);
}

}  // namespace m2n
