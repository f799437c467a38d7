// The op schemas of the `sculpt` namespace. Bodies are registered per dispatch key: csrc/cpu for CPU, csrc/linalg for every
// device, sculpt_ops/ops for Autograd, Meta, vmap and (choosing between library products, Triton and csrc/cuda) CUDA.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sculpt, m) {
  // The metrics are meant as keywords; torch registers no backward formula and no vmap for tensors that are keyword-only.
  m.def(
      "project(Tensor grad, Tensor? left=None, Tensor? right=None, Tensor? left_metric=None, Tensor? right_metric=None, "
      "*, bool keep_left=False, bool keep_right=False, bool block=False) -> Tensor");
  // A mutating op returns nothing: `Tensor(a!) -> Tensor(a!)` does not pass opcheck on every supported torch.
  m.def(
      "project_(Tensor(a!) grad, Tensor? left=None, Tensor? right=None, Tensor? left_metric=None, "
      "Tensor? right_metric=None, *, bool keep_left=False, bool keep_right=False, bool block=False) -> ()");
  m.def(
      "foreach_project_(Tensor(a!)[] grads, Tensor?[] lefts, Tensor?[] rights, Tensor?[]? left_metrics=None, "
      "Tensor?[]? right_metrics=None, *, bool[] keep_lefts=[], bool[] keep_rights=[], bool block=False) -> ()");
  // Private: library products of single matrices, each with bases of its own dtype; one dimension stands for no basis,
  // forms for its flags (csrc/linalg/project_products.cpp). Checks nothing.
  m.def(
      "_foreach_project_products_(Tensor[] grads, Tensor[] lefts, Tensor[] rights, Tensor(a!)[] outs, int[] forms) "
      "-> ()");
  // Private: what a list is looked up by (csrc/layout.cpp).
  m.def("_layout(Tensor[] tensors) -> Tensor");
  m.def(
      "restore_(Tensor(a!) weight, Tensor? left, Tensor? left_image, Tensor? right, Tensor? right_image, *, "
      "Tensor? core=None, Tensor? reference=None, bool keep_left=False, bool keep_right=False, bool block=False) "
      "-> ()");
  // `input` m x n; with `transpose` its transpose takes part. Half-precision input gives float32.
  // SymInt: with int, torch.compile would compile anew for every seed.
  m.def(
      "test_matrix(Tensor input, SymInt q, *, SymInt seed, bool transpose=False, bool rademacher=False, SymInt row=0, "
      "SymInt column=0) -> Tensor");
  m.def(
      "sketch(Tensor input, SymInt q, *, SymInt seed, bool transpose=False, bool rademacher=False, SymInt row=0, "
      "SymInt column=0) -> Tensor");
  m.def("orthonormalize(Tensor input) -> Tensor");
  m.def(
      "rsvd(Tensor input, int rank, Tensor? start=None, *, int oversample=16, int n_iter=2, SymInt seed=0) "
      "-> (Tensor U, Tensor S, Tensor V)");
  // Building blocks of the two, private: input @ factor, input^T @ input, and the eigendecomposition of a batch.
  m.def("_product(Tensor input, Tensor factor, *, bool transpose=False) -> Tensor");
  m.def("_gram(Tensor input, *, bool transpose=False, bool double=False) -> Tensor");
  m.def("_eigh(Tensor input) -> (Tensor values, Tensor vectors)");
  // Private: all singular triplets of small square float32 matrices, V not transposed; zero singular values have
  // orthonormal vectors too, NaN or Inf make a matrix's results NaN.
  m.def("_jacobi_svd(Tensor input) -> (Tensor U, Tensor S, Tensor V)");
  // Master weights of bfloat16 parameters, private: float32 as a bfloat16 and 16 more bits, and stochastic rounding.
  m.def("_join(Tensor high, Tensor low) -> Tensor");
  m.def("_split_(Tensor value, Tensor(a!) high, Tensor(b!) low) -> ()");
  m.def("_add_split_(Tensor(a!) high, Tensor(b!) low, Tensor step) -> ()");
  // AdamW's elementwise work before its steps are projected, private: counts + 1, moments, and steps = direction - decay.
  m.def(
      "_adam_(Tensor(a!)[] steps, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] counts, "
      "Tensor?[] weights, Tensor?[] lows, Tensor?[] starts, Tensor lr, *, float beta1, float beta2, float eps, "
      "float weight_decay, bool maximize=False) -> ()");
  m.def("_round_stochastic_(Tensor(a!) out, Tensor value, *, SymInt seed, SymInt offset=0) -> ()");
}
