// Lays arrays one after another in a kernel's scratch memory. Run over a null base it only counts the bytes,
// so that one function says what a kernel needs and where it lies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fence.h"

namespace tenfold::TENFOLD_ISA {
namespace {

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<uint8_t*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    uint8_t* at = base_ ? base_ + used_ : nullptr;
    if (at) ASAN_POISON_MEMORY_REGION(at + bytes, fenced(bytes) - bytes);
    used_ += fenced(bytes);
    return reinterpret_cast<T*>(at);
  }

  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace tenfold::TENFOLD_ISA
