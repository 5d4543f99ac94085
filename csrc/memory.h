// Memory that kernels read packed weights from, and write their intermediate results to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tenfold {

struct Free {
  void operator()(uint8_t* memory) const noexcept;
};
using Memory = std::unique_ptr<uint8_t[], Free>;

// Aligned to a cache line at least; on large pages where the system has them, since weights are read from end
// to end. Throws std::bad_alloc.
Memory allocate(size_t bytes);

// The calling thread's memory for one kernel call at a time; its content does not survive.
void* scratch(size_t bytes);

// The same for what passes between the kernels of a block.
uint8_t* workspace(size_t bytes);

}  // namespace tenfold
