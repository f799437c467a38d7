// Facts about the build, the choice of a variant on a GPU, and the words of Philox, for tests. pybind11 does not go with
// the limited API, so it stays out of the op library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/adam_chunks.h"
#include "common/both_panels.h"
#include "common/heuristics.h"
#include "common/jacobi.h"
#include "common/philox.h"
#include "common/side_panels.h"

namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, int64_t seed) {
  const sculpt::Words x = sculpt::philox({counter[0], counter[1], counter[2], counter[3]}, sculpt::Key::of(seed));
  return {x.a, x.b, x.c, x.d};
}

sculpt::Type type_of(const std::string& name) {
  if (name == "bfloat16") return sculpt::Type::kBFloat16;
  if (name == "float16") return sculpt::Type::kFloat16;
  if (name == "float32") return sculpt::Type::kFloat32;
  if (name == "float64") return sculpt::Type::kFloat64;
  throw pybind11::value_error("dtype: given '" + name + "', wanted bfloat16, float16, float32 or float64");
}

const char* choose(int64_t m, int64_t n, int64_t r, int64_t s, int64_t batch, const std::string& dtype,
                   const std::string& basis, int capability, bool hip, int64_t multiprocessors, int64_t l2_bytes,
                   bool triton, bool cuda, bool block) {
  const sculpt::Work work{m, n, r, s, batch, type_of(dtype), type_of(basis), block};
  switch (sculpt::choose(work, {capability, hip, multiprocessors, l2_bytes}, {triton, cuda})) {
    case sculpt::Variant::kTriton:
      return "triton";
    case sculpt::Variant::kCuda:
      return "cuda";
    default:
      return "cublas";
  }
}

int swizzled(int width, int row, int column) {
  if (width == 16) return sculpt::swizzled<16>(row, column);
  if (width == 32) return sculpt::swizzled<32>(row, column);
  if (width == 64) return sculpt::swizzled<64>(row, column);
  throw pybind11::value_error("width: given " + std::to_string(width) + ", wanted 16, 32 or 64");
}

pybind11::object side_panels(int64_t length, int64_t extent, int64_t r, int form, int64_t multiprocessors) {
  if (form < 0 || form > 3) throw pybind11::value_error("form: given " + std::to_string(form) + ", wanted 0 to 3");
  const sculpt::SidePanels plan =
      sculpt::side_panels(length, extent, r, static_cast<sculpt::BasisForm>(form), multiprocessors);
  if (!plan.fits) return pybind11::none();
  return pybind11::make_tuple(plan.cluster, plan.width, plan.rows, plan.ranks, plan.owned, plan.slots, plan.stages,
                              plan.bytes);
}

pybind11::dict pass(const sculpt::Pass& pass) {
  return pybind11::dict(pybind11::arg("columns") = pass.columns, pybind11::arg("slices") = pass.slices,
                        pybind11::arg("rows") = pass.rows, pybind11::arg("chunks") = pass.chunks,
                        pybind11::arg("panels") = pass.panels, pybind11::arg("bytes") = pass.bytes);
}

pybind11::object both_panels(int64_t m, int64_t n, int64_t r, int64_t s, bool split, bool block, int64_t multiprocessors,
                             int64_t shared_bytes, int capability) {
  const sculpt::BothPanels plan =
      sculpt::both_panels(m, n, r, s, split, block, {multiprocessors, shared_bytes, capability / 10});
  if (!plan.fits) return pybind11::none();
  const std::vector<int64_t> offsets = {plan.left_high,   plan.left_low,  plan.right_high, plan.right_low,
                                        plan.row_high,    plan.row_low,   plan.column_high, plan.column_low,
                                        plan.row_parts,   plan.column_parts, plan.core_parts, plan.core, plan.bytes};
  return pybind11::dict(pybind11::arg("ranks") = plan.ranks, pybind11::arg("cluster") = plan.cluster,
                        pybind11::arg("groups") = plan.groups, pybind11::arg("thin") = pass(plan.thin),
                        pybind11::arg("update") = pass(plan.update), pybind11::arg("offsets") = offsets);
}

// The launches for tensors of these sizes, and in the last one what a block begins with.
std::pair<std::vector<std::pair<int64_t, int64_t>>, std::pair<int64_t, int64_t>> adam_chunks(
    const std::vector<int64_t>& sizes, int64_t block) {
  std::vector<std::pair<int64_t, int64_t>> launches;
  sculpt::AdamChunks chunks;
  for (size_t i = 0; i < sizes.size();) {
    chunks = {};
    while (i < sizes.size() && chunks.add(sizes[i])) ++i;
    if (chunks.entries == 0) throw pybind11::value_error("sizes: given a tensor that has no room in a launch");
    launches.emplace_back(chunks.entries, chunks.total());
  }
  const int entry = chunks.entry_of(block);
  return {launches, {entry, chunks.begin(entry, block)}};
}

// The pairs of columns of every round of a sweep.
std::vector<std::vector<std::pair<int, int>>> jacobi_rounds(int q) {
  std::vector<std::vector<std::pair<int, int>>> rounds(sculpt::jacobi_rounds(q));
  for (size_t round = 0; round < rounds.size(); ++round)
    for (int k = 0; k < sculpt::jacobi_pairs(q); ++k) {
      const sculpt::JacobiPair pair = sculpt::jacobi_pair(q, static_cast<int>(round), k);
      if (pair.high < q) rounds[round].emplace_back(pair.low, pair.high);
    }
  return rounds;
}

// Of the 2 x 2 matrix whose entries are alpha, beta and gamma: sine, sine / (1 + cosine), and whether it turns.
std::tuple<float, float, bool> jacobi_rotation(float alpha, float beta, float gamma, int q) {
  const sculpt::JacobiRotation turn = sculpt::jacobi_rotation(alpha, beta, gamma, sculpt::jacobi_tolerance(q));
  return {turn.sine, turn.ratio, turn.turns};
}

bool stacked(int64_t m, int64_t n, int64_t r, int64_t s, const std::string& dtype) {
  return sculpt::stacked(m, n, r, s, type_of(dtype));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  using pybind11::arg;
  m.doc() = "Build facts of sculpt-ops, its choice of a variant on a GPU, and its random words.";
  m.def("philox", &philox, arg("counter"), arg("seed"),
        "The four words that Philox4x32-10 makes of a counter of four.");
  m.def("choose", &choose, arg("m"), arg("n"), arg("r"), arg("s"), arg("batch"), arg("dtype"), arg("basis"),
        arg("capability"), arg("hip"), arg("multiprocessors"), arg("l2_bytes"), arg("triton"), arg("cuda"),
        arg("block"),
        "The variant, cublas, triton or cuda, for batch matrices m x n with bases of ranks r and s (0: no basis).");
  m.def("stacked", &stacked, arg("m"), arg("n"), arg("r"), arg("s"), arg("dtype"),
        "Whether library products take both sides at once and not one after the other.");
  m.def("left_first", &sculpt::left_first, arg("m"), arg("n"), arg("r"), arg("s"),
        "Whether the left basis meets the matrix, and the right one their thin product, where one of them is enough.");
  m.def("swizzled", &swizzled, arg("width"), arg("row"), arg("column"),
        "Where an element of rows of 16-bit numbers lies in shared memory for a product of a warpgroup.");
  m.def("side_panels", &side_panels, arg("length"), arg("extent"), arg("r"), arg("form"), arg("multiprocessors"),
        "Blocks of a cluster, width of a panel, rows of each block, padded rank, ranks that a block adds up, panels in "
        "shared memory, exchanges under way and bytes of shared memory of one side's CUDA kernel, for m and n of a left "
        "basis, n and m of a right one; None where it cannot run. form: 0 a bfloat16 basis, 1 a float32 one, 2 a bfloat16 "
        "one with a metric, 3 a float16 one.");
  m.def("both_panels", &both_panels, arg("m"), arg("n"), arg("r"), arg("s"), arg("split"), arg("block"),
        arg("multiprocessors"), arg("shared_bytes"), arg("capability"),
        "How the two-sided projection's CUDA kernels divide a matrix and their scratch memory, of which `offsets` are the "
        "arrays' beginnings and the end; None where they cannot run.");
  m.def("adam_chunks", &adam_chunks, arg("sizes"), arg("block"),
        "How tensors of these sizes are dealt out to launches of the AdamW CUDA kernel: tensors and blocks of each, and "
        "the entry and the first element of a block of the last.");
  m.def("jacobi_rounds", &jacobi_rounds, arg("q"), "The pairs of columns of every round of a sweep of a Jacobi SVD.");
  m.def("jacobi_rotation", &jacobi_rotation, arg("alpha"), arg("beta"), arg("gamma"), arg("q"),
        "Sine, sine / (1 + cosine), and whether columns with these squared norms and this product are turned.");
  m.attr("thresholds") = pybind11::dict(
      arg("cuda_capability") = sculpt::kCudaCapability, arg("cuda_rank") = sculpt::kCudaRank,
      arg("cuda_bytes") = sculpt::kCudaBytes, arg("cuda_list") = sculpt::kCudaList,
      arg("cuda_ranks_block") = sculpt::kCudaRanksBlock, arg("least_group") = sculpt::kLeastGroup,
      arg("panel") = sculpt::kPanel, arg("l2_part") = sculpt::kL2Part, arg("max_rank") = sculpt::kMaxRank,
      arg("max_rank_float32") = sculpt::kMaxRankFloat32, arg("max_rank_float16") = sculpt::kMaxRankFloat16,
      arg("least_capability") = sculpt::kLeastCapability, arg("ops_per_byte_half") = sculpt::kOpsPerByteHalf,
      arg("ops_per_byte_float32") = sculpt::kOpsPerByteFloat32, arg("jacobi_max_size") = sculpt::kJacobiMaxSize);
  m.attr("torch_version") = TORCH_VERSION;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
