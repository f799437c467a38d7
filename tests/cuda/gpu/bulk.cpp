// Bulk copies: each goes its way in pieces, read, written and counted at any time before it is waited for, and some not
// before others that were asked for later. PTX ISA, sections "cp.async.bulk" and "Tensors".
#include <cstring>

#include "cuda.h"
#include "machine.h"

namespace emulated {

namespace {

constexpr uint64_t kEncoded = 0x6d61747269780001;
constexpr uint32_t kUnit = 16, kBoxAlignment = 128;

uint32_t bytes_of(const Matrix& m) { return static_cast<uint32_t>(m.box_columns) * m.box_rows * m.size; }

// A unit of a box, or of plain bytes, in shared memory: the swizzle changes bits 4 to 6 by those from bit 7 on.
uint32_t place(const Bulk& bulk, uint32_t begin, uint32_t unit) {
  const uint32_t address = begin + kUnit * unit, mask = bulk.matrix.span / kUnit ? bulk.matrix.span / kUnit - 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

// Calls f(where in global memory, where in the unit, bytes) for what of a unit is in the matrix.
template <typename F>
void in_matrix(const Bulk& bulk, uint32_t unit, F f) {
  const Matrix& m = bulk.matrix;
  const int numbers = static_cast<int>(kUnit) / m.size, across = m.box_columns / numbers;
  const int64_t row = int64_t{bulk.row} + unit / across, column = int64_t{bulk.column} + unit % across * numbers;
  const int64_t first = std::max<int64_t>(column, 0), last = std::min<int64_t>(column + numbers, m.columns);
  if (row < 0 || row >= m.rows || first >= last) return;
  f(m.begin + row * m.stride + first * m.size, (first - column) * m.size, static_cast<size_t>(last - first) * m.size);
}

[[noreturn]] void fail_for(const Bulk& bulk, const char* why) {
  current = bulk.by;
  fail(why);
}

void read(Piece& piece) {
  const Bulk& bulk = *piece.of;
  piece.data.assign(size_t{kUnit} * piece.units, 0);
  for (uint32_t i = 0; i < piece.units; ++i) {
    unsigned char* to = piece.data.data() + kUnit * i;
    if (bulk.kind == Bulk::kLoad) {
      in_matrix(bulk, piece.first + i, [&](auto* at, auto first, size_t size) { std::memcpy(to + first, at, size); });
      continue;
    }
    Block& block = *bulk.by->block;
    if (!block.running) fail_for(bulk, "a copy from a block that has ended");
    const uint32_t from = place(bulk, bulk.from, piece.first + i);
    for (uint32_t word = from; word < from + kUnit; word += 4)
      if (!shown(*bulk.by, stamp_of(block, word))) fail_for(bulk, "what a bulk copy has yet to read is written");
    std::memcpy(to, shared(block, from, kUnit, kUnit), kUnit);
  }
}

void write(const Piece& piece) {
  const Bulk& bulk = *piece.of;
  for (uint32_t i = 0; i < piece.units; ++i) {
    const unsigned char* from = piece.data.data() + kUnit * i;
    if (bulk.kind == Bulk::kStore) {
      in_matrix(bulk, piece.first + i, [&](auto* at, auto first, size_t size) { std::memcpy(at, from + first, size); });
      continue;
    }
    Block& block = block_of(*bulk.by->block, bulk.to);
    if (!block.running) fail_for(bulk, "a store after the end of its block");
    const uint32_t to = place(bulk, bulk.to, piece.first + i);
    std::memcpy(shared(block, to, kUnit, kUnit), from, kUnit);
    stamp(block, to, kUnit, {kBulkCopy, cluster->clock++});
  }
}

// True when nothing is left to be done.
bool step(Piece& piece) {
  const Bulk& bulk = *piece.of;
  const int now = piece.steps++;
  if (now == 0) return read(piece), false;
  if (now == 1) return write(piece), bulk.kind == Bulk::kStore;
  Block& block = block_of(*bulk.by->block, bulk.barrier);
  if (!block.running) fail_for(bulk, "a store after the end of its block");
  MemoryBarrier& barrier = barrier_at(block, bulk.barrier);
  barrier.bytes -= kUnit * piece.units;
  maybe_complete(barrier);
  return true;
}

void set_out(Bulk bulk, uint32_t units) {
  bulk.by = current;
  bulk.begins = cluster->epoch + (one_in(2) ? 0 : chance() % 3);
  const bool at_once = early();
  const int rank = bulk.kind == Bulk::kStore ? current->block->rank : block_of(*current->block, bulk.to).rank;
  const auto all = std::make_shared<const Bulk>(bulk);
  for (uint32_t first = 0, some; first < units; first += some) {
    some = std::min(units - first, 1u << chance() % 7);
    Piece piece{all, first, some, 0, {}};
    if (at_once)
      while (!step(piece)) {}
    else
      cluster->pieces[rank].push_back(std::move(piece)), ++cluster->pieces_open;
  }
  if (one_in(4)) give_way();
}

Matrix matrix_of(const void* map) {
  if (reinterpret_cast<uintptr_t>(map) % alignof(CUtensorMap)) fail("a map that is not aligned");
  if (!is_argument(map, sizeof(CUtensorMap))) look_at(map, sizeof(CUtensorMap), false);
  Matrix m;
  std::memcpy(&m, map, sizeof(m));
  if (m.encoded != kEncoded) fail("a map that was not encoded");
  // How such rows lie in shared memory is not said.
  if (m.span && m.box_columns * m.size != m.span) fail("a box narrower than its swizzle is not emulated");
  return m;
}

void look_at_matrix(const Bulk& bulk) {
  for (uint32_t unit = 0; unit < bytes_of(bulk.matrix) / kUnit; ++unit)
    in_matrix(bulk, unit, [&](auto* at, auto, size_t size) { look_at(at, size, bulk.kind == Bulk::kStore); });
}

void look_at_source(uint32_t from, uint32_t bytes, uint32_t alignment) {
  Block& own = *current->block;
  if (from >> kRankShift) fail("a bulk copy from another block");
  shared(own, from, bytes, alignment);
  for (uint32_t word = from; word < from + bytes; word += 4)
    if (!shown(*current, stamp_of(own, word))) fail("a bulk copy reads what no proxy fence has shown it");
}

void look_at_target(uint32_t to, uint32_t bytes, uint32_t alignment, uint32_t barrier) {
  Block& block = block_of(*current->block, to);
  if (&block != &block_of(*current->block, barrier)) fail("a bulk copy and its barrier in different blocks");
  if (!block.running) fail("a bulk copy to a block that has ended");
  shared(*current->block, to, bytes, alignment);
  if (!shown(*current, barrier_at(block, barrier).made)) fail("a bulk copy's barrier that no proxy fence has shown it");
  // An ordinary store could come after the copy.
  for (uint32_t word = to; word < to + bytes; word += 4)
    if (const Stamp& by = stamp_of(block, word); by.writer >= 0 && !shown(*current, by))
      fail("a bulk copy over what no proxy fence has shown it");
}

}  // namespace

bool deliver_pieces(int rank) {
  auto& pieces = cluster->pieces[rank];
  bool any = false;
  for (size_t i = chance() % 16; i > 0 && !pieces.empty(); --i) {
    Piece& piece = pieces[chance() % pieces.size()];
    if (piece.of->begins > cluster->epoch) continue;
    any = true;
    if (!step(piece)) continue;
    std::swap(piece, pieces.back());
    pieces.pop_back(), --cluster->pieces_open;
  }
  return any;
}

void end_pieces() {
  for (auto& pieces : cluster->pieces)
    for (Piece& piece : pieces) {
      if (piece.of->kind != Bulk::kStore) fail_for(*piece.of, "a store after the end of its block");
      while (!step(piece)) {}
    }
}

}  // namespace emulated

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  constexpr int kSizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  static_assert(sizeof(emulated::Matrix) <= sizeof(CUtensorMap));
  if (type < 0 || type > CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 2) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle < 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  const int size = kSizes[type], span = swizzle ? 16 << swizzle : 0;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(address) % 16 || address == nullptr)
    return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] % 16 || strides[0] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i)
    if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * size % 16 || (span && box[0] * size > static_cast<cuuint32_t>(span))) return CUDA_ERROR_INVALID_VALUE;
  const emulated::Matrix m{emulated::kEncoded, static_cast<unsigned char*>(address), static_cast<int64_t>(sizes[0]),
                           static_cast<int64_t>(sizes[1]), static_cast<int64_t>(strides[0]),
                           static_cast<int>(box[0]), static_cast<int>(box[1]), size, span};
  std::memset(map, 0, sizeof(*map)), std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *found = known && version >= 12000 ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  if (result)
    *result = !known    ? cudaDriverEntryPointSymbolNotFound
              : *found ? cudaDriverEntryPointSuccess
                       : cudaDriverEntryPointVersionNotSufficent;
  return cudaSuccess;
}

namespace ptx {

using namespace emulated;

void load_box(uint32_t to, const void* map, int column, int row, uint32_t barrier) {
  const Bulk bulk{Bulk::kLoad, current, to, 0, barrier, matrix_of(map), column, row, 0, 0};
  const uint32_t bytes = bytes_of(bulk.matrix);
  look_at_target(to, bytes, kBoxAlignment, barrier);
  look_at_matrix(bulk);
  set_out(bulk, bytes / kUnit);
}

void store_box(const void* map, int column, int row, uint32_t from) {
  const Bulk bulk{Bulk::kStore, current, 0, from, 0, matrix_of(map), column, row, current->groups, 0};
  const uint32_t bytes = bytes_of(bulk.matrix);
  look_at_source(from, bytes, kBoxAlignment);
  look_at_matrix(bulk);
  current->groups_wanted = current->groups + 1;
  set_out(bulk, bytes / kUnit);
}

void close_stores() { ++current->groups; }

void wait_for_reads(int newer) {
  if (one_in(2)) give_way();
  const uint64_t until = current->groups - std::min<uint64_t>(current->groups, newer);
  for (Piece& piece : cluster->pieces[current->block->rank])
    if (piece.of->kind == Bulk::kStore && piece.of->by == current && piece.of->group < until && piece.steps == 0)
      step(piece);
  current->groups_read = std::max(current->groups_read, until);
}

}  // namespace ptx
