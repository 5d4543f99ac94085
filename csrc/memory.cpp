#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "fence.h"

namespace tenfold {

void Free::operator()(uint8_t* memory) const noexcept { std::free(memory); }

Memory allocate(size_t bytes) {
  constexpr size_t kPage = 4096, kLargePage = size_t{2} << 20;
  const size_t alignment = bytes < kLargePage ? kPage : kLargePage;
  if (bytes > SIZE_MAX - alignment) throw std::bad_alloc();
  const size_t size = (bytes + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<uint8_t*>(std::aligned_alloc(alignment, size ? size : alignment)));
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kLargePage) madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  ASAN_POISON_MEMORY_REGION(memory.get() + bytes, size - bytes);
  return memory;
}

namespace {

// Memory that grows and is kept.
class Buffer {
 public:
  uint8_t* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = allocate(bytes + bytes / 4);
      size_ = bytes + bytes / 4;
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), bytes);
    ASAN_POISON_MEMORY_REGION(memory_.get() + bytes, size_ - bytes);
    return memory_.get();
  }

 private:
  Memory memory_;
  size_t size_ = 0;
};

}  // namespace

void* scratch(size_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

uint8_t* workspace(size_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes);
}

}  // namespace tenfold
