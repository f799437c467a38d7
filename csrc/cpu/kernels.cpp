// Chooses the panel kernels for this machine, once.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sculpt::cpu {
namespace {

bool runs(const Kernels& k) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&k == &kAvx2) return avx2;
  if (&k == &kAvx512) return avx512;
  if (&k == &kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return &k == &kGeneric;
}

const Kernels& choose() {
#if defined(__x86_64__)
  const Kernels* all[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kGeneric};
#else
  const Kernels* all[] = {&kGeneric};
#endif
  const char* wanted = std::getenv("SCULPT_CPU");
  for (const Kernels* k : all)
    if ((!wanted || !std::strcmp(wanted, k->name)) && runs(*k)) return *k;
  throw std::runtime_error(std::string("SCULPT_CPU: given '") + wanted +
                           "', wanted one of generic, avx2, avx512, avx512bf16 that this processor runs");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sculpt::cpu
