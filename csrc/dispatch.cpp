#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>

namespace tenfold {
namespace {

#define X(result, name, arguments) &TABLE::name,
#define TABLE baseline
constexpr KernelTable kBaseline = {"baseline", TENFOLD_KERNELS(X)};
#undef TABLE
#if defined(__x86_64__)
#define TABLE avx2
constexpr KernelTable kAvx2 = {"avx2", TENFOLD_KERNELS(X)};
#undef TABLE
#define TABLE avxvnni
constexpr KernelTable kAvxVnni = {"avxvnni", TENFOLD_KERNELS(X)};
#undef TABLE
#define TABLE avx512
constexpr KernelTable kAvx512 = {"avx512", TENFOLD_KERNELS(X)};
#undef TABLE
#endif
#undef X

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows it: leaf 7, subleaf 1, bit 4 of eax. The system keeps the registers
// if it does for AVX2.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

std::atomic<const KernelTable*> selected{&kBaseline};

}  // namespace

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables = {&kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&kAvx2);
  if (avx2 && has_avx_vnni()) tables.push_back(&kAvxVnni);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
    tables.push_back(&kAvx512);
  }
#endif
  return tables;
}

const KernelTable& kernels() noexcept { return *selected.load(std::memory_order_acquire); }

void select_table(std::string_view name) {
  std::string names;
  for (const KernelTable* table : available_tables()) {
    if (name == table->name) return selected.store(table, std::memory_order_release);
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("no kernels for '" + std::string(name) +
                              "' on this processor; it can run: " + names);
}

}  // namespace tenfold
