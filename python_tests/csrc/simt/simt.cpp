#include "simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

namespace simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kLanes = 32;
constexpr size_t kArena = 256 << 10;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  Context context;
  bool done = false;
  const uint64_t* waits_for = nullptr;  // runs again once this is no longer `seen`
  uint64_t seen = 0;
  unsigned phase = 0;  // of the warp's exchanges
  std::vector<std::vector<Copy>> copies{1};
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[2][kLanes * kMostExchanged];
  size_t bytes[2][kLanes];
};

struct Block {
  std::vector<Fiber> fibers{kMostThreads};
  std::vector<Warp> warps{kMostThreads / kLanes};
  Barrier barrier;
  int threads = 0;
  unsigned block = 0, blocks = 0;
  int current = 0;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
};

Block state;
int order = 0;  // 0 forward, 1 reverse, 2 random
int64_t most_shared = 232448;
int processors = 4;
std::mt19937 shuffler(1);
alignas(1024) unsigned char arena[kArena];

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: block %u, thread %d: %s\n", state.block, state.current, what);
  std::abort();
}

Fiber& self() { return state.fibers[static_cast<size_t>(state.current)]; }

void yield() { state.scheduler.resume_from(self().context); }

void enter() {
  self().context.entered();
  (*state.kernel)();
  if (self().copies.size() > 1 || !self().copies[0].empty())
    fail("returned before its asynchronous copies were waited for");
  self().done = true;
  yield();
}

void wait(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self().seen = barrier.generation;
  self().waits_for = &barrier.generation;
  yield();
}

void run_block() {
  std::vector<int> turn(static_cast<size_t>(state.threads));
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  for (int left = state.threads; left > 0;) {
    if (order == 2) std::shuffle(turn.begin(), turn.end(), shuffler);
    bool moved = false;
    for (const int thread : turn) {
      Fiber& fiber = state.fibers[static_cast<size_t>(thread)];
      if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      fiber.waits_for = nullptr;
      state.current = thread;
      fiber.context.resume_from(state.scheduler);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) fail("waits at a barrier that other threads never reach");
  }
}

void begin(int thread) {
  Fiber& fiber = state.fibers[static_cast<size_t>(thread)];
  fiber.context.start(enter);
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.phase = 0;
  fiber.copies.assign(1, {});
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(state.current)}; }
Index block_index() { return {state.block}; }
Index block_size() { return {static_cast<unsigned>(state.threads)}; }
Index grid_size() { return {state.blocks}; }
void* shared() { return arena; }
int64_t shared_limit() { return most_shared; }
int multiprocessors() { return processors; }

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (threads <= 0 || threads > kMostThreads || threads % kLanes != 0)
    fail("a block of other than whole warps");
  if (shared_bytes > most_shared) fail("more shared memory than a block has");
  state.threads = threads;
  state.blocks = static_cast<unsigned>(blocks);
  state.kernel = &kernel;
  for (int64_t block = 0; block < blocks; ++block) {
    state.block = static_cast<unsigned>(block);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(arena, kArena);
    ASAN_POISON_MEMORY_REGION(arena + (shared_bytes + 7) / 8 * 8,
                              kArena - static_cast<size_t>((shared_bytes + 7) / 8 * 8));
#endif
    std::memset(arena, 0xff, static_cast<size_t>(shared_bytes));
    for (int thread = 0; thread < threads; ++thread) begin(thread);
    run_block();
  }
}

void block_barrier() { wait(state.barrier, state.threads); }

void warp_barrier() {
  wait(state.warps[static_cast<size_t>(state.current / kLanes)].barrier, kLanes);
}

const unsigned char* exchange(const void* mine, size_t bytes) {
  Warp& warp = state.warps[static_cast<size_t>(state.current / kLanes)];
  const unsigned side = self().phase++ % 2;
  const int lane = state.current % kLanes;
  std::memcpy(warp.slots[side] + static_cast<size_t>(lane) * kMostExchanged, mine, bytes);
  warp.bytes[side][lane] = bytes;
  warp_barrier();
  for (const size_t other : warp.bytes[side])
    if (other != bytes) fail("the lanes of its warp are at different warp functions");
  return warp.slots[side];
}

void require_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp function without all lanes");
}

// Copies happen when they are waited for, and not before: who reads too early sees it.
void copy_later(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("an asynchronous copy that is not aligned to 16 bytes");
  self().copies.back().push_back({to, from, valid});
}

void require_aligned(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("a row of a matrix that is not aligned to 16 bytes");
}

void commit_copies() { self().copies.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = self().copies;  // the last one is not committed yet
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simt

extern "C" {

void simt_set_order(int order) {
  simt::order = order;
  simt::shuffler.seed(1);
}

// As many bytes of shared memory as a smaller GPU has, so that small matrices take its other paths.
void simt_set_shared_limit(int64_t bytes) { simt::most_shared = bytes; }

// So few that a handful of blocks fills the device.
void simt_set_multiprocessors(int64_t count) { simt::processors = static_cast<int>(count); }
}
