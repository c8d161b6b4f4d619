// Threads: a loop over independent tasks, on as many threads as the caller asks for.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

namespace moca {

// Whether this process was made by fork(). OpenMP's threads stay behind in the parent, and a team
// of more than one thread then waits for them for ever.
bool in_forked_child();

// Runs body(task, thread) for every task in [0, tasks). Tasks are handed out one by one, so
// uneven ones balance. In a forked child one thread runs them all.
// The first exception thrown by a task is rethrown on the calling thread.
template <typename Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || in_forked_child()) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    try {
      body(task, omp_get_thread_num());
    } catch (...) {
#pragma omp critical(moca_parallel_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace moca
