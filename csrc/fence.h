// Arrays that share an allocation stand apart under the address sanitizer: what lies between them is closed, and it
// reports whoever touches that.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

namespace tenfold {

// Bytes that an array takes up: whole cache lines, and a closed one behind it.
constexpr size_t fenced(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return (bytes + 63) / 64 * 64 + 64;
#else
  return (bytes + 63) / 64 * 64;
#endif
}

}  // namespace tenfold
