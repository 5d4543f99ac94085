#pragma once

#include <nanobind/nanobind.h>

namespace tenfold {

// Adds the kernels of a layer other than its products to the module.
void bind_layers(nanobind::module_& m);

}  // namespace tenfold
