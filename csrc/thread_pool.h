// A persistent pool of threads: they spin for a moment after each job, since the next one of a layer is near,
// then sleep.
//
// One job runs at a time; the calling thread takes part. Jobs of different callers queue. A task must not
// start a job.
#pragma once

#include <cstdint>

namespace tenfold {

using Task = void (*)(const void* context, int64_t task, int thread) noexcept;

constexpr int kMostThreads = 1024;

// Runs tasks 0 .. tasks - 1, each once, on at most so many threads, numbered from 0, and returns when all are
// done.
void run_tasks(int64_t tasks, int most_threads, Task task, const void* context) noexcept;

int threads() noexcept;
void set_threads(int count);  // at most kMostThreads

}  // namespace tenfold
