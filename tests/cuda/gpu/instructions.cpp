// The instructions, as the PTX ISA describes them; bulk copies are in bulk.cpp. What is asynchronous happens at some time
// before it is waited for.
#include <cstring>

#include "machine.h"

namespace emulated {

namespace {

Block& own() { return *current->block; }

float bfloat16_at(const unsigned char* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// half: it is a float16.
float number_at(const unsigned char* from, bool half) {
  if (!half) return bfloat16_at(from);
  _Float16 x;
  std::memcpy(&x, from, 2);
  return static_cast<float>(x);
}

// An operand of a warpgroup's product, by its descriptor: PTX ISA, "Matrix Descriptor" and the canonical layouts.
struct Operand {
  Fiber& fiber;
  uint32_t start, leading, stride, row, mask;
  bool across, half;

  Operand(Fiber& fiber, uint64_t d, bool across, bool half) : fiber(fiber), across(across), half(half) {
    start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    const int swizzle = static_cast<int>(d >> 62);
    if (swizzle == 0 || (d >> 49 & 7) != 0) fail("a descriptor of no layout that is emulated");
    // Rows of 128, 64, 32 bytes: three, two, one bits above bit 4 change by those from bit 7 on.
    row = 256 >> swizzle, mask = (16 >> swizzle) - 1;
  }

  float at(int beside, int k) const {
    uint32_t address = start;
    if (across) {
      const int wide = static_cast<int>(row / 2);
      // The next row's width of numbers along M or N; none further if a wide operand is to repeat the same.
      if (beside >= wide && leading % (8 * row)) fail("an operand that goes on within eight rows");
      address += beside / wide * leading + beside % wide * 2 + k % 8 * row + k / 8 * stride;
      if (start % row + beside % wide * 2 >= row) fail("an operand beyond the end of its row");
    } else {
      address += beside % 8 * row + beside / 8 * stride + k * 2;
      if (start % row + k * 2 >= row) fail("an operand beyond the end of its row");
    }
    address ^= (address >> 7 & mask) << 4;
    const unsigned char* from = shared(*fiber.block, address, 2, 2);
    if (!shown(fiber, stamp_of(*fiber.block, address))) fail("a product reads what no proxy fence has shown it");
    return number_at(from, half);
  }
};

void compute_one(Fiber& fiber, const Product& p) {
  const Operand b(fiber, p.b, p.b_across, p.half);
  const int row = 16 * (static_cast<int>(fiber.thread) / 32 % 4) + fiber.lane() / 4;
  float x[2][16];
  if (p.held.empty()) {
    const Operand a(fiber, p.a, p.a_across, p.half);
    for (int k = 0; k < 16; ++k) x[0][k] = a.at(row, k), x[1][k] = a.at(row + 8, k);
  } else {
    // They may have been read at any time until now: those of this thread must still be what they were.
    for (int j = 0; j < 4; ++j)
      if (*p.held_at[j] != p.held[4 * static_cast<size_t>(fiber.lane() % 4) + j]) fail("a held operand has changed");
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 2; ++j) {
        const uint32_t pair = p.held[4 * static_cast<size_t>(k % 8 / 2) + j + 2 * (k / 8)];
        x[j][k] = number_at(reinterpret_cast<const unsigned char*>(&pair) + k % 2 * 2, p.half);
      }
  }
  for (size_t i = 0; i < p.d.size(); i += 4)
    for (int j = 0; j < 2; ++j) {
      const int column = static_cast<int>(2 * i) + 2 * (fiber.lane() % 4) + j;
      float above = 0.0f, below = 0.0f;
      for (int k = 0; k < 16; ++k) {
        const float y = b.at(column, k);
        above += x[0][k] * y, below += x[1][k] * y;
      }
      *p.d[i + j] += above, *p.d[i + 2 + j] += below;
    }
}

}  // namespace

MemoryBarrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address & ((1u << kRankShift) - 1));
  if (found == block.barriers.end()) fail("a barrier that was not made");
  return found->second;
}

void maybe_complete(MemoryBarrier& barrier) {
  if (barrier.bytes > 0xfffff || barrier.bytes < -0xfffff) fail("a barrier of more bytes than it counts");
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase, barrier.pending = barrier.count;
  wake(barrier.waiting);
}

void compute(Fiber& fiber, size_t count) {
  for (; count > 0 && !fiber.products.empty(); --count, fiber.products.pop_front())
    compute_one(fiber, fiber.products.front());
}

static void write(Block& block, const Store& store) {
  std::memcpy(shared(block, store.at, 8, 8), store.data, 8);
  stamp(block, store.at, 8, {kFromAfar, cluster->clock++});
}

void deliver(int rank) {
  Block& block = cluster->blocks[rank];
  if (!block.running) fail("a store after the end of its block");
  auto& stores = cluster->stores[rank];
  std::swap(stores[chance() % stores.size()], stores.back());
  const Store store = stores.back();
  stores.pop_back(), --cluster->stores_open;
  if (!store.written) write(block, store);
  MemoryBarrier& barrier = barrier_at(block, store.barrier);
  barrier.bytes -= 8;
  maybe_complete(barrier);
}

void land(Fiber& fiber, const Copy& copy) {
  std::memcpy(shared(*fiber.block, copy.to, 16, 16), copy.from, 16);
  stamp(*fiber.block, copy.to, 16, {fiber.number, fiber.fences});
}

}  // namespace emulated

extern "C" void __tsan_read16(void*);

namespace ptx {

using namespace emulated;

void load(uint32_t& x, uint32_t address) {
  std::memcpy(&x, shared(own(), address, 4, 4), 4);
  if (one_in(256)) give_way();
}

void load_four(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t address) {
  uint32_t all[4];
  std::memcpy(all, shared(own(), address, 16, 16), 16);
  x = all[0], y = all[1], z = all[2], w = all[3];
  if (one_in(64)) give_way();
}

void load_four(float& x, float& y, float& z, float& w, uint32_t address) {
  float all[4];
  Block& there = block_of(own(), address);
  if (!there.running) fail("a load from a block that has ended");
  std::memcpy(all, shared(own(), address, 16, 16), 16);
  x = all[0], y = all[1], z = all[2], w = all[3];
  if (one_in(64)) give_way();
}

void store(uint32_t address, uint32_t x) {
  std::memcpy(shared(own(), address, 4, 4), &x, 4);
  stamp(own(), address, 4, {current->number, current->fences});
  if (one_in(256)) give_way();
}

void map(uint32_t& there, uint32_t address, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail("a block that is not in the cluster");
  there = (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

// Eight bytes of one by themselves: a vector is not one access.
static void store_eight(uint32_t address, uint32_t x, uint32_t y, uint32_t barrier) {
  Block& block = block_of(own(), address);
  if (address >> kRankShift == 0 || address >> kRankShift != barrier >> kRankShift)
    fail("a store and its barrier in different blocks");
  if (!block.running) fail("a store to a block that has ended");
  shared(own(), address, 8, 8);
  barrier_at(block, barrier);
  Store now{address, barrier, {x, y}, one_in(4)};
  if (now.written) write(block, now);
  cluster->stores[block.rank].push_back(now), ++cluster->stores_open;
  if (one_in(64)) give_way();
}

void store_async(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint32_t barrier) {
  shared(own(), address, 16, 16);
  store_eight(address, x, y, barrier), store_eight(address + 8, z, w, barrier);
}

void make_barrier(uint32_t barrier, uint32_t count) {
  if (count < 1 || count > 0xfffff) fail("a barrier of more threads than it counts");
  shared(own(), barrier, 8, 8);
  own().barriers[barrier] = {count, count, 0, 0, {current->number, current->fences}, {}};
}

void arrive(uint32_t barrier) { expect(barrier, 0); }

void expect(uint32_t address, uint32_t bytes) {
  MemoryBarrier& barrier = barrier_at(own(), address);
  if (barrier.pending == 0) fail("more arrive at a barrier than it counts");
  barrier.bytes += bytes, --barrier.pending;
  maybe_complete(barrier);
  // In the order of the ISA bytes are expected first: a phase that is over by then had no right to end.
  if (one_in(4)) give_way();
}

// A thread waits for each phase in turn; when it is asked for, the phase goes on or is the last that ended. The first may
// be the one before the first, which has ended: so does a producer find room.
void wait(uint32_t address, uint32_t parity) {
  MemoryBarrier& barrier = barrier_at(own(), address);
  const int64_t phase = current->waits.emplace(address, parity ? -1 : 0).first->second++;
  if ((phase & 1) != parity) fail("a wait for another phase than the next");
  while (barrier.phase <= phase) {
    barrier.waiting.push_back(current);
    emulated::sleep();
  }
  if (barrier.phase > phase + 1) fail("a wait for a phase two behind");
  if (one_in(4)) give_way();
}

void cluster_barrier() { meet(cluster->meeting); }

void meet_some(int id, int threads) {
  if (id < 1 || id > 15 || threads < 1 || threads % 32) fail("a barrier that cannot be");
  Meeting& meeting = own().named[id];
  if (meeting.come == 0) meeting.wanted = threads;
  if (meeting.wanted != static_cast<size_t>(threads)) fail("threads meet in different numbers");
  if (meeting.come + 1 == meeting.wanted) {
    std::map<const Warp*, int> lanes{{&current->warp(), 1}};
    for (const Fiber* fiber : meeting.waiting) ++lanes[&fiber->warp()];
    for (const auto& [warp, count] : lanes)
      if (count != 32) fail("part of a warp meets others");
  }
  meet(meeting);
}

void copy_async(uint32_t to, const void* from) {
  __tsan_read16(const_cast<void*>(from));
  const Copy copy{to, from};
  shared(own(), to, 16, 16);
  if (early())
    land(*current, copy);
  else
    current->open_copies.push_back(copy);
  if (one_in(64)) give_way();
}

void close_copies() {
  current->copies.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void wait_for_copies(int newer) {
  for (auto& copies = current->copies; copies.size() > static_cast<size_t>(newer); copies.pop_front())
    for (const Copy& copy : copies.front()) land(*current, copy);
  if (one_in(4)) give_way();
}

// Eight rows in eight different groups of banks.
static void look_at_banks(const uint32_t* rows) {
  for (int i = 0; i < 64; ++i)
    if (rows[i / 8] != rows[i % 8] && rows[i / 8] % 128 == rows[i % 8] % 128) fail("a bank conflict");
}

static void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed) {
  Warp& warp = current->warp();
  const int lane = current->lane();
  const uint32_t round = warp.round[lane]++ & 1;
  uint32_t(&rows)[32] = warp.rows[round];
  rows[lane] = row;
  meet(warp.meeting);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
      std::memcpy(&pair[j], shared(own(), rows[8 * matrix + r], 16, 16) + 2 * c, 2);
    }
    x[matrix] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
  look_at_banks(rows + lane / 8 * 8);
  // Before what was read is written over.
  meet(warp.meeting);
}

void matrices(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row) {
  uint32_t all[4];
  load_matrices(all, row, false);
  x = all[0], y = all[1], z = all[2], w = all[3];
}

void matrices_transposed(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row) {
  uint32_t all[4];
  load_matrices(all, row, true);
  x = all[0], y = all[1], z = all[2], w = all[3];
}

static void store_matrices(uint32_t row, const uint32_t (&x)[4], bool transposed) {
  Warp& warp = current->warp();
  const int lane = current->lane();
  uint32_t(&rows)[32] = warp.rows[warp.round[lane]++ & 1];
  rows[lane] = row;
  meet(warp.meeting);
  look_at_banks(rows + lane / 8 * 8);
  for (int i = 0; i < 8; ++i) {
    const int one = lane / 4, other = 2 * (lane % 4) + i % 2;
    const uint32_t to = rows[8 * (i / 2) + (transposed ? other : one)];
    const auto number = static_cast<uint16_t>(x[i / 2] >> 16 * (i % 2));
    const int column = transposed ? one : other;
    std::memcpy(shared(own(), to, 16, 16) + 2 * column, &number, 2);
    stamp(own(), to + 2 * column, 2, {current->number, current->fences});
  }
  if (one_in(16)) give_way();
}

void store_four(uint32_t row, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  store_matrices(row, {x, y, z, w}, false);
}

void store_four_transposed(uint32_t row, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  store_matrices(row, {x, y, z, w}, true);
}

void multiply(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
              uint32_t b0, uint32_t b1) {
  Warp& warp = current->warp();
  const int lane = current->lane();
  const uint32_t round = warp.round[lane]++ & 1;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::memcpy(warp.a[round][lane], a, sizeof(a)), std::memcpy(warp.b[round][lane], b, sizeof(b));
  meet(warp.meeting);
  float* c[4] = {&c0, &c1, &c2, &c3};
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const auto* x = reinterpret_cast<unsigned char*>(&warp.a[round][row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)]);
      const auto* y = reinterpret_cast<unsigned char*>(&warp.b[round][column * 4 + k % 8 / 2][k / 8]);
      sum += bfloat16_at(x + k % 2 * 2) * bfloat16_at(y + k % 2 * 2);
    }
    *c[i] += sum;
  }
}

void fence_products() {
  current->fenced = true;
  if (one_in(32)) give_way();
}

void product(std::initializer_list<float*> d, bool half, uint64_t a, uint64_t b, int a_across, int b_across) {
  if (!current->fenced) fail("a product before a fence");
  Product now{d, a, b, a_across != 0, b_across != 0, half};
  auto& all = own().products[current->thread / 128];
  const size_t number = current->products_made++;
  if (number == all.size()) all.push_back(now);
  if (!all[number].same(now)) fail("a warpgroup's threads multiply different operands");
  current->open_products.push_back(std::move(now));
}

void held_product(std::initializer_list<float*> d, bool half, std::initializer_list<const uint32_t*> a, uint64_t b,
                  int b_across) {
  product(d, half, 0, b, 0, b_across);
  Product& now = current->open_products.back();
  now.held_at = a, now.held.resize(16);
  Warp& warp = current->warp();
  const uint32_t round = warp.round[current->lane()]++ & 1;
  for (int j = 0; j < 4; ++j) warp.a[round][current->lane()][j] = *now.held_at[j];
  meet(warp.meeting);
  for (int beside = 0; beside < 4; ++beside)
    std::memcpy(&now.held[4 * static_cast<size_t>(beside)], warp.a[round][current->lane() / 4 * 4 + beside], 16);
}

void close_products() {
  for (auto& product : current->open_products) current->products.push_back(std::move(product));
  current->open_products.clear();
  if (early()) compute(*current, 1 + chance() % 4);
  if (one_in(8)) give_way();
}

void wait_for_products() {
  compute(*current, current->products.size());
  current->fenced = false;
}

void fence_proxy() {
  ++current->fences;
  current->fenced_at = cluster->clock;
}

}  // namespace ptx
