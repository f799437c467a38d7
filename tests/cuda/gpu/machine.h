// What the emulated GPU keeps of a thread, a warp, a block and its barriers (machine.cpp, instructions.cpp, bulk.cpp).
#pragma once
#include <setjmp.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
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

// Who last wrote four bytes of shared memory: a thread, with how many proxy fences it had then executed, or a store from
// afar, with the time, or a bulk copy.
constexpr int kFromAfar = -1, kNobody = -2, kBulkCopy = -3;
struct Stamp {
  int writer = kNobody;
  uint64_t when = 0;
};

struct MemoryBarrier {
  int64_t count = 1, pending = 1, bytes = 0, phase = 0;
  Stamp made;
  std::vector<Fiber*> waiting;
};

struct Product {
  std::vector<float*> d;
  uint64_t a, b;
  bool a_across, b_across;  // stored with rows along the other dimension than K
  bool half;                // of float16, not of bfloat16
  // The first operand in registers: this thread's, and what the four lanes of its rows had there, four each.
  std::vector<const uint32_t*> held_at = {};
  std::vector<uint32_t> held = {};
  bool same(const Product& p) const {
    return d.size() == p.d.size() && a == p.a && b == p.b && a_across == p.a_across && b_across == p.b_across &&
           half == p.half;
  }
};

struct Block {
  int rank = 0, running = 0;
  dim3 index;
  size_t bytes = 0, fixed_bytes = 0;
  unsigned char *memory = nullptr, *fixed = nullptr;  // dynamic, and what the kernel declares by size
  Meeting meeting, named[16];
  std::vector<Warp> warps;
  std::map<uint32_t, MemoryBarrier> barriers;
  std::vector<Stamp> stamps;
  std::vector<std::vector<Product>> products;  // of each warpgroup, to compare its threads' operands
};

struct Copy {
  uint32_t to;
  const void* from;
};

// A matrix in global memory, as the bytes of a CUtensorMap tell of it.
struct Matrix {
  uint64_t encoded;
  unsigned char* begin;
  int64_t columns, rows, stride;  // of rows, in bytes
  int box_columns, box_rows, size, span;  // of a number, of the swizzle (0: none), in bytes
};

// A bulk copy, in units of 16 bytes.
struct Bulk {
  enum Kind { kLoad, kStore } kind;
  Fiber* by;
  uint32_t to, from, barrier;
  Matrix matrix;
  int column, row;
  uint64_t group;   // of the thread's stores
  unsigned begins;  // not before this epoch
};

// Some units of it, on their way by themselves: read, written, counted.
struct Piece {
  std::shared_ptr<const Bulk> of;
  uint32_t first, units;
  int steps;
  std::vector<unsigned char> data;
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
  // Groups of boxes stored: closed, known to be read, up to the last that has any.
  uint64_t groups = 0, groups_read = 0, groups_wanted = 0;
  std::map<uint32_t, int64_t> waits;
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
  std::vector<std::vector<Piece>> pieces;  // to each block, and from it to global memory
  std::vector<Fiber> fibers;
  std::vector<Warp*> warps;
  Meeting meeting;
  size_t running = 0, stores_open = 0, pieces_open = 0;
  uint64_t clock = 1;
  unsigned epoch = 0;
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
// False if no piece can go on.
bool deliver_pieces(int rank);
// What bulk copies have left to do when all threads have ended.
void end_pieces();
void land(Fiber& fiber, const Copy& copy);
void compute(Fiber& fiber, size_t count);
// Where `size` bytes lie at an address of the cluster's shared memory; they must be there, be aligned, hold no barrier.
unsigned char* shared(Block& own, uint32_t address, size_t size, size_t alignment);
Block& block_of(Block& own, uint32_t address);
void stamp(Block& block, uint32_t address, size_t size, Stamp stamp);
Stamp& stamp_of(Block& block, uint32_t address);
// Whether the async proxy sees what was written, for an instruction of `asks`: the thread that wrote has executed a fence
// since, or the one that asks if it came from afar.
bool shown(const Fiber& asks, const Stamp& by);
MemoryBarrier& barrier_at(Block& block, uint32_t address);
void maybe_complete(MemoryBarrier& barrier);
bool is_argument(const void* pointer, size_t size);
// Fails unless arrays in global memory hold it.
void look_at(const void* pointer, size_t size, bool write);

}  // namespace emulated
