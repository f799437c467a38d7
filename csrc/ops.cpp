// The op schemas of the `sculpt` namespace. Bodies are registered per dispatch key: csrc/cpu for CPU,
// sculpt_ops/ops for Autograd, Meta, vmap and (through Triton or library products) CUDA.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sculpt, m) {
  m.def(
      "project(Tensor grad, Tensor? left=None, Tensor? right=None, *, bool keep_left=False, bool keep_right=False, "
      "bool block=False) -> Tensor");
  // A mutating op returns nothing: `Tensor(a!) -> Tensor(a!)` does not pass opcheck on every supported torch.
  m.def(
      "project_(Tensor(a!) grad, Tensor? left=None, Tensor? right=None, *, bool keep_left=False, "
      "bool keep_right=False, bool block=False) -> ()");
  m.def(
      "foreach_project_(Tensor(a!)[] grads, Tensor?[] lefts, Tensor?[] rights, *, bool[] keep_lefts=[], "
      "bool[] keep_rights=[], bool block=False) -> ()");
  m.def(
      "restore_(Tensor(a!) weight, Tensor? left, Tensor? left_image, Tensor? right, Tensor? right_image, *, "
      "Tensor? core=None, Tensor? reference=None, bool keep_left=False, bool keep_right=False, bool block=False) "
      "-> ()");
}
