// A stand-in for the CUDA runtime that runs the .cu files' kernels on a processor, so that the sanitizers can watch them.
//
// A thread of a block is a fiber: it runs until it comes to a barrier or to its end, then another one of its block does, in an order that is
// drawn anew for each stretch between two barriers. So whoever reads what another has not written yet gets a wrong result, and the thread
// sanitizer, which is told of barriers and of nothing else, reports the race even where the result is right. Blocks run at the same time,
// on a few real threads; nothing orders one before another, so two blocks that write one place without an atomic are reported, too.
// Shared memory belongs to the real thread: its next block finds what the last one left in it, as on a GPU.
// A warp is 32 fibers in a row, which take turns like all others. At a shuffle they wait for each other, and all 32 must come to the same one;
// it hands on one number and orders nothing else, so whoever takes it for a barrier is reported.
//
// What this cannot show: time; a GPU's own memory order and caches (an atomic here is as strong as the processor's); real warps, where some
// lanes take a branch before the others.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>
#if defined(__SANITIZE_THREAD__)
extern "C" { void* __tsan_create_fiber(unsigned); void __tsan_switch_to_fiber(void*, unsigned); void* __tsan_get_current_fiber();
             void __tsan_acquire(void*); void __tsan_release(void*); }
#define SHIM_UNSEEN __attribute__((no_sanitize("thread")))  // the stand-in's own memory
#else
#define SHIM_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" { void __sanitizer_start_switch_fiber(void**, const void*, size_t); void __sanitizer_finish_switch_fiber(void*, const void**, size_t*); }
#endif

struct dim3 { unsigned x, y, z; };
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__ static
#define __device__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __syncthreads() shim::barrier(__LINE__)
#define __shfl_xor_sync(mask, v, d) shim::shuffle(__LINE__, mask, v, threadIdx.x % 32 ^ (unsigned)(d))
#define __shfl_down_sync(mask, v, d) shim::shuffle(__LINE__, mask, v, threadIdx.x % 32 + (unsigned)(d))
#define FTLAB_LAUNCH(kernel, grid, block, stream, ...) shim::launch((grid), (block), [=] { kernel(__VA_ARGS__); })
typedef void* cudaStream_t;
inline int cudaGetLastError() { return 0; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class V> V atomicAdd(V* p, V v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

namespace shim {

constexpr size_t STACK = 64 << 10;
struct Fiber {
  ucontext_t begin; void* place[5]; char* stack; void* tsan;
  int line;  // of the barrier that it waits at; below 0: of the shuffle; 0: it has ended
  bool begun, done, goes;
  unsigned index, from;  // from: the lane whose number a shuffle gives it
  uint64_t given, got;
};
struct Pool { std::unique_ptr<char[]> stacks; std::vector<void*> tsan; };  // made once, as it takes long
struct Worker {
  void* place[5];  // where it went on, as the compiler keeps it: swapcontext would ask the system each time
  void* tsan = nullptr;
  const void* stack = nullptr;  // of the real thread, as the address sanitizer tells it
  size_t size = 0;
  Fiber* now = nullptr;
  const std::function<void()>* body = nullptr;
  int start = 0, meet = 0, end = 0;  // places that tell the thread sanitizer who waited for whom
};
inline thread_local Worker* worker;

SHIM_UNSEEN __attribute__((noinline)) inline void go(void** to, ucontext_t* begin) {
  if (begin) setcontext(begin);
  __builtin_longjmp(to, 1);
}
// From one place to another, or to a fiber's beginning; what was written before is not thereby known to the other
SHIM_UNSEEN __attribute__((noinline)) inline void jump(void** from, void** to, ucontext_t* begin, void* tsan, const void* stack, size_t size,
                                                       bool last = false) {
  (void)tsan; (void)stack; (void)size; (void)last;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
#endif
  if (!__builtin_setjmp(from)) go(to, begin);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
SHIM_UNSEEN inline void back(bool last = false) { Worker* w = worker; jump(w->now->place, w->place, nullptr, w->tsan, w->stack, w->size, last); }
inline void acquire(void* p) {
  (void)p;
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
}
inline void release(void* p) {
  (void)p;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
}

SHIM_UNSEEN inline void barrier(int line) {
  Worker* w = worker;
  w->now->line = line;
  release(&w->meet); back(); acquire(&w->meet);
}

SHIM_UNSEEN inline void fail(const char* why) { fprintf(stderr, "stand-in: %s\n", why); exit(3); }

SHIM_UNSEEN inline uint64_t trade(int line, uint64_t given, unsigned from) {
  Fiber* f = worker->now;
  f->line = -line; f->given = given; f->from = from;
  back();
  return f->got;
}
template <class V> V shuffle(int line, unsigned mask, V v, unsigned from) {
  static_assert(sizeof(V) <= 8, "a shuffle takes 4 or 8 bytes");
  if (mask != 0xffffffffu || blockDim.x % 32) fail("a shuffle is for whole warps");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = trade(line, bits, from < 32 ? from : threadIdx.x % 32);
  memcpy(&v, &bits, sizeof v);
  return v;
}
// Whether any warp waits at a shuffle; it goes on then, and the others wait
SHIM_UNSEEN inline bool shuffles(std::vector<Fiber>& fibers) {
  bool any = false;
  for (auto& f : fibers) {
    const Fiber* warp = &fibers[f.index/32*32];
    if (f.line != warp->line && (f.line < 0 || warp->line < 0)) fail("a shuffle that not all lanes of a warp come to");
    f.goes = f.line < 0;
    if (f.goes) { f.got = warp[f.from].given; any = true; }
  }
  return any;
}

SHIM_UNSEEN inline void enter() {
  Worker* w = worker;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &w->stack, &w->size);
#endif
  acquire(&w->start);
  (*w->body)();
  release(&w->end);
  w->now->done = true; w->now->line = 0;
  back(true);
  abort();
}

SHIM_UNSEEN inline void block(std::vector<Fiber>& fibers, std::mt19937& order) {
  Worker* w = worker;
  std::vector<Fiber*> turn;
  for (auto& f : fibers) {
    getcontext(&f.begin);
    f.begin.uc_stack.ss_sp = f.stack; f.begin.uc_stack.ss_size = STACK; f.begin.uc_link = nullptr;
    makecontext(&f.begin, enter, 0);
    f.begun = f.done = false; f.goes = true; turn.push_back(&f);
  }
  release(&w->start);
  for (bool all = false; !all;) {
    std::shuffle(turn.begin(), turn.end(), order);
    for (Fiber* f : turn) if (f->goes) {
      w->now = f; threadIdx = {f->index, 0, 0};
      bool first = !f->begun;
      f->begun = true;
      jump(w->place, f->place, first ? &f->begin : nullptr, f->tsan, f->stack, STACK);
    }
    if (shuffles(fibers)) continue;
    all = turn[0]->done;
    for (Fiber* f : turn) {
      if (f->done != all) fail("a thread ended while others wait at a barrier");
      if (!all && f->line != turn[0]->line) fail("threads wait at different barriers");
      f->goes = true;
    }
  }
  acquire(&w->end);
}

SHIM_UNSEEN inline void work(unsigned first, unsigned step, unsigned grid, unsigned threads, const std::function<void()>& body, unsigned seed, Pool& pool) {
  Worker mine;
  if (!pool.stacks) pool.stacks.reset(new char[1024*STACK]);
  worker = &mine; mine.body = &body;
#if defined(__SANITIZE_THREAD__)
  mine.tsan = __tsan_get_current_fiber();
#endif
  std::vector<Fiber> fibers(threads);
  for (unsigned i = 0; i < threads; i++) { fibers[i].stack = pool.stacks.get() + i*STACK; fibers[i].index = i; fibers[i].tsan = nullptr; }
#if defined(__SANITIZE_THREAD__)
  while (pool.tsan.size() < threads) pool.tsan.push_back(__tsan_create_fiber(0));
  for (auto& f : fibers) f.tsan = pool.tsan[f.index];
#endif
  std::mt19937 order(seed);
  gridDim = {grid, 1, 1}; blockDim = {threads, 1, 1};
  for (unsigned b = first; b < grid; b += step) { blockIdx = {b, 0, 0}; block(fibers, order); }
}

inline void launch(unsigned grid, unsigned threads, std::function<void()> body) {
  static unsigned seed = 0;
  static Pool pools[3];
  if (grid == 0 || threads == 0 || threads > 1024) fail("a launch of no blocks, or of too many threads");
  const unsigned workers = std::min(grid, 3u);
  std::vector<std::thread> all;
  seed++;
  for (unsigned i = 0; i < workers; i++) all.emplace_back([&, i] { work(i, workers, grid, threads, body, 7*seed + i, pools[i]); });
  for (auto& t : all) t.join();
}

}  // namespace shim
