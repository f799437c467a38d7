// A GPU in slow motion: every thread of a cluster is a fiber. Which runs next is chance, and in each of a number of epochs
// some warps do not run at all and some blocks get nothing that others sent, as long as anything else can go on: what
// goes wrong in a rare order on a GPU goes wrong here soon. All that a thread reads and writes is looked at: the kernel is
// compiled with the calls of a thread sanitizer, which are answered here.
#include "machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>

namespace emulated {

Device device;
Fiber* current = nullptr;
Cluster* cluster = nullptr;
Chance chance;
std::string wrong;

namespace {

constexpr size_t kStack = 64 * 1024, kFixed = 48 * 1024;

struct Memory {
  const char* end;
  bool writable;
};
std::map<const char*, Memory> allowed;  // by where it begins
jmp_buf scheduler, end;
Launch now;
// Of this run: one access to memory in how many lets others run, and one copy in how many is there at once.
unsigned rest_every, early_every;
std::vector<bool> held;

void enter() {
  now.kernel(now.arguments);
  Fiber& fiber = *current;
  for (const auto& group : fiber.copies)
    if (!group.empty()) fail("copies never waited for");
  if (!fiber.open_copies.empty() || !fiber.products.empty() || !fiber.open_products.empty())
    fail("copies or products never waited for");
  if (fiber.groups_read < fiber.groups_wanted) fail("the reads of boxes to store never waited for");
  fiber.done = true;
  --fiber.block->running, --cluster->running;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    ucontext_t begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = fiber.stack, begin.uc_stack.ss_size = kStack, begin.uc_link = nullptr;
    makecontext(&begin, enter, 0);
    setcontext(&begin);
  }
  current = nullptr;
}

void new_epoch() {
  const unsigned asleep = 1 + chance() % 3;
  ++cluster->epoch;
  for (Block& block : cluster->blocks) {
    const bool all = one_in(4);
    for (Warp& warp : block.warps) warp.asleep = all || chance() % 4 < asleep;
    held[block.rank] = one_in(2);
  }
}

// One warp, some of its threads; false if none can run.
bool run_one() {
  const std::vector<Warp*>& warps = cluster->warps;
  size_t i = chance() % warps.size(), tried = 0;
  for (; warps[i]->asleep || warps[i]->ready.empty(); i = i + 1 == warps.size() ? 0 : i + 1)
    if (++tried == warps.size()) return false;
  Warp& warp = *warps[i];
  for (size_t turns = one_in(4) ? 1 : warp.ready.size(); turns > 0 && !warp.ready.empty(); --turns) {
    std::swap(warp.ready[chance() % warp.ready.size()], warp.ready.back());
    Fiber& fiber = *warp.ready.back();
    warp.ready.pop_back();
    if (!fiber.products.empty() && one_in(2)) compute(fiber, 1 + chance() % fiber.products.size());
    resume(fiber);
  }
  return true;
}

// False if nothing is on its way to a block that gets anything now.
bool deliver_some() {
  bool any = false;
  for (Block& block : cluster->blocks) {
    auto& stores = cluster->stores[block.rank];
    if (held[block.rank]) continue;
    any |= deliver_pieces(block.rank);
    if (stores.empty()) continue;
    any = true;
    for (size_t i = chance() % 64; i > 0 && !stores.empty(); --i) deliver(block.rank);
  }
  return any;
}

void run_cluster() {
  int64_t left = 0;
  while (cluster->running > 0) {
    if (--left < 0) new_epoch(), left = int64_t{1} << chance() % 14;
    bool any = cluster->stores_open + cluster->pieces_open > 0 && deliver_some();
    any |= run_one();
    if (any) continue;
    left = 0;
    bool ready = false;
    for (Block& block : cluster->blocks)
      for (Warp& warp : block.warps) ready |= !warp.ready.empty();
    ready |= cluster->stores_open + cluster->pieces_open > 0;
    if (!ready) fail("every thread waits");
  }
  for (const auto& stores : cluster->stores)
    if (!stores.empty()) fail("a store after the end of its block");
  end_pieces();
}

}  // namespace

// Ends the run: what the threads hold is lost.
void fail(const char* why) {
  wrong = why;
  if (current)
    wrong += ": block " + std::to_string(current->block->index.x) + ", thread " + std::to_string(current->thread);
  _longjmp(end, 1);
}

void sleep() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void give_way() {
  current->warp().ready.push_back(current);
  sleep();
}

void wake(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) fiber->warp().ready.push_back(fiber);
  fibers.clear();
}

int meet(Meeting& meeting, int value, int kind) {
  const unsigned round = meeting.round & 1;
  if (meeting.come == 0) meeting.kind = kind, meeting.sum[round] = 0;
  if (meeting.kind != kind) fail("threads meet at different barriers");
  meeting.sum[round] += value;
  if (++meeting.come < meeting.wanted) {
    meeting.waiting.push_back(current);
    sleep();
    return meeting.sum[round];
  }
  meeting.come = 0, ++meeting.round;
  wake(meeting.waiting);
  const int sum = meeting.sum[round];
  if (one_in(2)) give_way();
  return sum;
}

Block& block_of(Block& own, uint32_t address) {
  const uint32_t rank = address >> kRankShift;
  if (rank == 0) return own;
  if (rank > cluster->blocks.size()) fail("an address in a block that is not in the cluster");
  return cluster->blocks[rank - 1];
}

unsigned char* shared(Block& own, uint32_t address, size_t size, size_t alignment) {
  Block& block = block_of(own, address);
  const uint32_t at = address & ((1u << kRankShift) - 1);
  if (at < kBase || at - kBase + size > block.bytes) fail("an address outside of shared memory");
  if (at % alignment) fail("an address in shared memory that is not aligned");
  const auto next = block.barriers.lower_bound(at + static_cast<uint32_t>(size));
  if (next != block.barriers.begin() && std::prev(next)->first + 8 > at) fail("a barrier is read or written");
  return block.memory + (at - kBase);
}

void stamp(Block& block, uint32_t address, size_t size, Stamp stamp) {
  const uint32_t at = (address & ((1u << kRankShift) - 1)) - kBase;
  for (uint32_t i = at / 4; i < (at + size + 3) / 4; ++i) block.stamps[i] = stamp;
}

Stamp& stamp_of(Block& block, uint32_t address) {
  return block.stamps[((address & ((1u << kRankShift) - 1)) - kBase) / 4];
}

bool shown(const Fiber& asks, const Stamp& by) {
  if (by.writer == kFromAfar) return asks.fenced_at > by.when;
  return by.writer < 0 || cluster->fibers[by.writer].fences > by.when;
}

dim3 thread_index() { return dim3(current->thread); }
dim3 block_index() { return current->block->index; }
int rank_in_cluster() { return current->block->rank; }
int blocks_in_cluster() { return static_cast<int>(cluster->blocks.size()); }
unsigned char* dynamic_memory() { return current->block->memory; }
unsigned char* fixed_memory(size_t bytes) {
  if (bytes > kFixed) fail("more shared memory than there is");
  current->block->fixed_bytes = bytes;
  return current->block->fixed;
}
int meet_block(int value, int kind) { return meet(current->block->meeting, value, kind); }
void meet_warp() { meet(current->warp().meeting); }

uint32_t shared_address(const void* pointer) {
  // An array that is not there is never read, and may be said to begin beyond the memory.
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - current->block->memory) + kBase;
}

uint32_t exchange(uint32_t value, int from) {
  Warp& warp = current->warp();
  const uint32_t round = warp.round[current->lane()]++ & 1;
  warp.values[round][current->lane()] = value;
  meet(warp.meeting);
  return warp.values[round][from];
}

void allow(const void* begin, size_t bytes, bool writable) {
  if (begin == nullptr) return;
  const auto* at = static_cast<const char*>(begin);
  Memory& piece = allowed.insert({at, {at, false}}).first->second;
  piece.end = std::max(piece.end, at + bytes), piece.writable |= writable;
}
void forget() { allowed.clear(); }

void run(const Launch& launch) {
  wrong.clear();
  if (_setjmp(end)) {
    current = nullptr, cluster = nullptr;
    return;
  }
  now = launch, gridDim = launch.grid, blockDim = dim3(launch.threads);
  const unsigned size = launch.cluster, threads = launch.threads;
  if (launch.grid.x % size || threads % 32 || threads > 1024) fail("a grid that cannot be");
  chance.seed(device.seed);
  rest_every = 8u << chance() % 8, early_every = 1 + chance() % 8;
  const size_t fibers = size * threads, room = (launch.bytes + 4095) / 1024 * 1024;
  auto* stacks = static_cast<char*>(
      mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  auto* memory = static_cast<unsigned char*>(std::aligned_alloc(1024, room * size));
  std::vector<unsigned char> fixed(kFixed * size);
  for (unsigned y = 0; y < launch.grid.y; ++y)
    for (unsigned x = 0; x < launch.grid.x; x += size) {
      // Not a number wherever nothing is written before it is read.
      std::memset(memory, 0xff, room * size), std::fill(fixed.begin(), fixed.end(), 0xff);
      Cluster of_now;
      cluster = &of_now;
      cluster->blocks.resize(size), cluster->stores.resize(size), cluster->pieces.resize(size);
      cluster->fibers.resize(fibers);
      held.assign(size, false);
      cluster->meeting.wanted = cluster->running = fibers;
      for (unsigned rank = 0; rank < size; ++rank) {
        Block& block = cluster->blocks[rank];
        block.rank = rank, block.running = threads, block.index = dim3(x + rank, y), block.bytes = launch.bytes;
        block.memory = memory + room * rank, block.fixed = fixed.data() + kFixed * rank;
        block.meeting.wanted = threads, block.stamps.resize(launch.bytes / 4 + 1);
        block.products.resize(threads / 128 + 1), block.warps.resize(threads / 32);
        for (Warp& warp : block.warps) warp.meeting.wanted = 32, cluster->warps.push_back(&warp);
      }
      for (size_t i = 0; i < fibers; ++i) {
        Fiber& fiber = cluster->fibers[i];
        fiber.number = static_cast<int>(i), fiber.thread = i % threads, fiber.block = &cluster->blocks[i / threads];
        fiber.stack = stacks + i * kStack;
        fiber.warp().ready.push_back(&fiber);
      }
      run_cluster();
      cluster = nullptr;
    }
  munmap(stacks, fibers * kStack);
  std::free(memory);
}

bool is_argument(const void* pointer, size_t size) {
  const auto *at = static_cast<const char*>(pointer), *given = static_cast<const char*>(now.arguments);
  return at >= given && at + size <= given + now.arguments_bytes;
}

void look_at(const void* pointer, size_t size, bool write) {
  const auto* at = static_cast<const char*>(pointer);
  const auto next = allowed.upper_bound(at);
  if (next != allowed.begin()) {
    const Memory& piece = std::prev(next)->second;
    if (at + size <= piece.end && (piece.writable || !write)) return;
  }
  fail(write ? "a store outside of all arrays" : "a load outside of all arrays");
}

// What the kernel itself reads or writes through a pointer.
static void touch(const void* pointer, size_t size, size_t alignment, bool write) {
  if (!current) return;
  const auto* at = static_cast<const char*>(pointer);
  if (at >= current->stack && at + size <= current->stack + kStack) return;
  Block& block = *current->block;
  const auto* memory = reinterpret_cast<const char*>(block.memory);
  if (at >= memory && at < memory + block.bytes) {
    const uint32_t address = shared_address(pointer);
    shared(block, address, size, alignment);
    if (write) stamp(block, address, size, {current->number, current->fences});
    if (one_in(rest_every)) give_way();
    return;
  }
  const auto* fixed = reinterpret_cast<const char*>(block.fixed);
  if (at >= fixed && at + size <= fixed + block.fixed_bytes) {
    if (one_in(rest_every)) give_way();
    return;
  }
  if (!write && is_argument(pointer, size)) return;
  for (const dim3* sizes : {&gridDim, &blockDim}) {
    const auto* begin = reinterpret_cast<const char*>(sizes);
    if (!write && at >= begin && at + size <= begin + sizeof(dim3)) return;
  }
  if (reinterpret_cast<uintptr_t>(pointer) % alignment) fail("an address in global memory that is not aligned");
  look_at(pointer, size, write);
}

bool early() { return one_in(early_every); }

}  // namespace emulated

#define TOUCH(size)                                                                                                \
  void __tsan_read##size(void* p) { emulated::touch(p, size, size, false); }                                       \
  void __tsan_write##size(void* p) { emulated::touch(p, size, size, true); }                                       \
  void __tsan_unaligned_read##size(void* p) { emulated::touch(p, size, 1, false); }                                \
  void __tsan_unaligned_write##size(void* p) { emulated::touch(p, size, 1, true); }                                \
  void __tsan_volatile_read##size(void* p) { emulated::touch(p, size, size, false); }                              \
  void __tsan_volatile_write##size(void* p) { emulated::touch(p, size, size, true); }
extern "C" {
const char* wrong() { return emulated::wrong.c_str(); }
TOUCH(1)
TOUCH(2)
TOUCH(4)
TOUCH(8)
TOUCH(16)
void __tsan_read_range(void* p, size_t size) { emulated::touch(p, size, 1, false); }
void __tsan_write_range(void* p, size_t size) { emulated::touch(p, size, 1, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
