// Which table of kernels runs.
#pragma once

#include <string_view>
#include <vector>

#include "kernels.h"

namespace tenfold {

// The tables that this processor can run, the narrowest first.
std::vector<const KernelTable*> available_tables();

// The table in use.
const KernelTable& kernels() noexcept;

// Throws std::invalid_argument where the name is unknown or beyond this processor.
void select_table(std::string_view name);

}  // namespace tenfold
