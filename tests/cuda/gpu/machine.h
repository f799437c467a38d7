// What the emulated GPU keeps of a thread, a warp, a block and its barriers (machine.cpp, instructions.cpp).
#pragma once
#include <setjmp.h>

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "emulated.h"

namespace emulated {

// Shared memory begins at 1024, as on the device; the address in another block has its rank + 1 in the bits above these.
constexpr uint32_t kBase = 1024, kRankShift = 24;

struct Fiber;

// Threads that wait for each other.
struct Meeting {
  size_t wanted = 0, come = 0;
  unsigned round = 0;
  int kind = 0, sum[2] = {};
  std::vector<Fiber*> waiting;
};

struct Warp {
  bool asleep = false;
  std::vector<Fiber*> ready;
  Meeting meeting;
  uint32_t round[32] = {}, values[2][32], rows[2][32], a[2][32][4], b[2][32][2];
};

struct MemoryBarrier {
  int64_t count = 1, pending = 1, bytes = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

// Who last wrote four bytes of shared memory: a thread, with how many proxy fences it had then executed, or a store from
// afar (writer -1), with the time.
struct Stamp {
  int writer = -2;
  uint64_t when = 0;
};

struct Product {
  std::vector<float*> d;
  uint64_t a, b;
  bool a_across, b_across;  // stored with rows along the other dimension than K
  bool same(const Product& p) const {
    return d.size() == p.d.size() && a == p.a && b == p.b && a_across == p.a_across && b_across == p.b_across;
  }
};

struct Block {
  int rank = 0, running = 0;
  dim3 index;
  size_t bytes = 0, fixed_bytes = 0;
  unsigned char *memory = nullptr, *fixed = nullptr;  // dynamic, and what the kernel declares by size
  Meeting meeting;
  std::vector<Warp> warps;
  std::map<uint32_t, MemoryBarrier> barriers;
  std::vector<Stamp> stamps;
  std::vector<std::vector<Product>> products;  // of each warpgroup, to compare its threads' operands
};

struct Copy {
  uint32_t to;
  const void* from;
};

struct Fiber {
  jmp_buf place;
  char* stack = nullptr;
  int number = 0;  // in the cluster
  unsigned thread = 0;
  Block* block = nullptr;
  bool started = false, done = false, fenced = false;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
  std::vector<Product> open_products;
  std::deque<Product> products;  // of closed groups
  size_t products_made = 0;
  uint64_t fences = 0, fenced_at = 0;
  std::map<uint32_t, uint64_t> waits;
  int lane() const { return static_cast<int>(thread % 32); }
  Warp& warp() const { return block->warps[thread / 32]; }
};

// Eight bytes on their way to another block.
struct Store {
  uint32_t at, barrier, data[2];
  bool written;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<std::vector<Store>> stores;  // to each block
  std::vector<Fiber> fibers;
  std::vector<Warp*> warps;
  Meeting meeting;
  size_t running = 0, stores_open = 0;
  uint64_t clock = 1;
};

extern Fiber* current;
extern Cluster* cluster;
// Any generator will do; one whose low bits go through short cycles will not.
struct Chance {
  uint64_t state = 1;
  void seed(uint64_t from) { state = (from + 1) * 0x9e3779b97f4a7c15; }
  uint32_t operator()() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
};
extern Chance chance;

[[noreturn]] void fail(const char* why);
// Whether a copy or a product is there at once.
bool early();
inline bool one_in(unsigned n) { return chance() % n == 0; }
void give_way();
void sleep();
void wake(std::vector<Fiber*>& fibers);
int meet(Meeting& meeting, int value = 0, int kind = 0);
void deliver(int rank);
void land(Fiber& fiber, const Copy& copy);
void compute(Fiber& fiber, size_t count);
// Where `size` bytes lie at an address of the cluster's shared memory; they must be there, be aligned, hold no barrier.
unsigned char* shared(Block& own, uint32_t address, size_t size, size_t alignment);
Block& block_of(Block& own, uint32_t address);
void stamp(Block& block, uint32_t address, size_t size, Stamp stamp);

}  // namespace emulated
