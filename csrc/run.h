// Runs kernels: each gets its scratch and its threads, and while a profile is taken its time and work are noted.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tenfold {

void run(Product op);
void run(ExpertLayer op);
void run(DeltaNet op);
void run(KeysAndValues op);
void run(Attention op);
void run(const RmsNorm& op);
void run(const Router& op);
void run(const SwiGlu& op);

// What the calls of one kernel came to. `bytes`: of weights, states, keys and values, that cannot be in a cache;
// `operations`: multiplications and additions of numbers of its format.
struct Use {
  std::string kernel;
  int64_t calls;
  double seconds, bytes, operations;
};

// Between the two all threads' calls are noted.
void start_profile();
std::vector<Use> stop_profile();

}  // namespace tenfold
