#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

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
  return memory;
}

void* scratch(size_t bytes) {
  static thread_local Memory memory;
  static thread_local size_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory = allocate(bytes + bytes / 4);
    size = bytes + bytes / 4;
  }
  return memory.get();
}

}  // namespace tenfold
