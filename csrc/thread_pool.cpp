#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

namespace tenfold {
namespace {

constexpr int kSpins = 16000;  // some 200 us: longer than what lies between two steps

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Cores that this process may use: where taskset or a container leave it some only, more threads would wait for each other.
int cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// Waits until `value` is no longer `old`.
template <class T>
void await_change(const std::atomic<T>& value, T old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  value.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void set_threads(int count) {
    const std::lock_guard lock(callers);
    threads_.store(count, std::memory_order_relaxed);
  }

  void run(int64_t tasks, int most_threads, Task task, const void* context) {
    const std::lock_guard lock(callers);
    const int helpers = static_cast<int>(std::min<int64_t>(std::min(threads(), most_threads), tasks)) - 1;
    task_ = task, context_ = context, tasks_ = tasks, helpers_ = helpers;
    next_.store(0, std::memory_order_relaxed);
    if (helpers > 0) open(helpers);
    work(0);
    if (helpers > 0) close();
  }

  std::mutex callers;

 private:
  // The lowest bit of `entered_` says that the job is over, the rest counts the workers inside: a worker
  // enters an open job only, and the job's fields change only while it is closed and nobody is inside.
  static constexpr uint32_t kClosed = 1, kWorker = 2;

  void open(int helpers) {
    for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this, started_ + 1).detach();
    entered_.store(0, std::memory_order_release);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
  }

  void close() {
    uint32_t inside = entered_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    for (; inside != kClosed; inside = entered_.load(std::memory_order_acquire))
      await_change(entered_, inside);
  }

  bool enter() {
    uint32_t inside = entered_.load(std::memory_order_relaxed);
    while (!(inside & kClosed)) {
      if (entered_.compare_exchange_weak(inside, inside + kWorker, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() {
    if (entered_.fetch_sub(kWorker, std::memory_order_acq_rel) == (kWorker | kClosed)) entered_.notify_all();
  }

  void work(int thread) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, i, thread);
  }

  void serve(int thread) {
    for (uint32_t job = 0;; job = job_.load(std::memory_order_acquire)) {
      if (enter()) {
        if (thread <= helpers_) work(thread);
        leave();
      }
      await_change(job_, job);
    }
  }

  Task task_ = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0;
  int helpers_ = 0;
  int started_ = 0;
  std::atomic<int> threads_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> entered_{kClosed};
  alignas(64) std::atomic<uint32_t> job_{0};
};

// Never destroyed: its threads may outlive the interpreter's last call. A forked child has none of its
// parent's threads, so it starts with a pool of its own; no job runs while the process forks.
Pool*& pool() {
  static Pool* instance = [] {
    pthread_atfork([] { pool()->callers.lock(); }, [] { pool()->callers.unlock(); },
                   [] { pool() = new Pool(pool()->threads()); });
    return new Pool(cores());
  }();
  return instance;
}

}  // namespace

void run_tasks(int64_t tasks, int most_threads, Task task, const void* context) noexcept {
  pool()->run(tasks, most_threads, task, context);
}

int threads() noexcept { return pool()->threads(); }

void set_threads(int count) { pool()->set_threads(count); }

}  // namespace tenfold
