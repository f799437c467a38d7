// ATen operators through the dispatcher, for ops that are composed of them on every device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

namespace sculpt::aten {

using torch::stable::Tensor;

template <class... Out, size_t... i>
std::tuple<Out...> unpack(const StableIValue* stack, std::index_sequence<i...>) {
  return {torch::stable::detail::to<Out>(stack[i])...};
}

// `Out...` are the results; the overload name is "" for the default one. The stable ABI has no `Scalar` arguments.
template <class... Out, class... In>
auto call(const char* name, const char* overload, const In&... in) {
  namespace stable = torch::stable::detail;
  std::array<StableIValue, std::max(sizeof...(In), sizeof...(Out))> stack{stable::from(in)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  if constexpr (sizeof...(Out) == 1) {
    return stable::to<Out...>(stack[0]);
  } else {
    return unpack<Out...>(stack.data(), std::index_sequence_for<Out...>());
  }
}

// Runs `f` on the calling thread with library calls inside it kept to one thread. LAPACK on factors of some hundred
// columns gains little from a second one and waits for it dozens of times: beside one other busy process a Cholesky
// factorization of 144 x 144 took 112 ms so, and 0.1 ms on one thread.
template <class F>
void serially(bool on_cpu, const F& f) {
  if (!on_cpu || torch::stable::get_num_threads() == 1) return f();
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) {
    if (begin == 0) f();
  });
}

}  // namespace sculpt::aten
