// The same on a GPU: many tensors in one launch, a block of threads for each 4096 numbers of a list or of a mask.
// Sees the CUDA runtime alone; which numbers, and what becomes of them, is adamw.h, which the CPU tests cover.
#include "cuda.h"
#include "adamw.h"
using namespace ftlab;
using namespace ftlab::adamw;

template <class T, int what> __device__ void one(const Job& j, int64_t at, int64_t i) {
  typedef typename T::type N;
  if (what == LIST || what == ADD) {
    float g = T::in(((const N*)j.p)[at]);
    j.m[i] = what == ADD ? j.m[i] + g : g;
    return;
  }
  float x = T::in(((N*)j.p)[at]), m = j.m[i], v = j.v[i];
  update(x, what == DENSE ? T::in(((const N*)j.g)[at]) : ((const float*)j.g)[i], m, v, j.rates);
  ((N*)j.p)[at] = T::out(x); j.m[i] = m; j.v[i] = v;
}

// 32 flags of a mask; the last bytes are read one by one, as the mask may end there
__device__ uint32_t word(const Chosen& c, int64_t w) {
  uint32_t bits = 0;
  for (int b = 0; b < 4; b++) if (w*32 + b*8 < c.count) bits |= (uint32_t)c.bits[w*4 + b] << 8*b;
  return bits;
}
// The block's chosen places are listed first, in shared memory; then each thread takes a place, so that none is idle where few
// numbers are chosen, and many lines of memory are waited for together
template <class T, int what> __device__ void by_bits(const Job& j, int64_t block) {
  constexpr int WORDS = BLOCK/32, EACH = WORDS/8;  // a warp of the eight lists 16 words
  __shared__ uint32_t words[WORDS];
  __shared__ uint16_t at[BLOCK];
  __shared__ int all;
  const Chosen& c = j.chosen;
  int lane = threadIdx.x % 32, w = threadIdx.x/32*EACH, n = 0;
  __syncthreads();  // whoever is still at the last block's places
  if (threadIdx.x < WORDS) words[threadIdx.x] = word(c, block*WORDS + threadIdx.x);
  __syncthreads();
  for (int k = lane; k < w; k += 32) n += __popc(words[k]);
  for (int d = 16; d; d /= 2) n += __shfl_xor_sync(0xffffffffu, n, d);
  for (int k = w; k < w + EACH; k++) {
    uint32_t bits = words[k];
    if (bits >> lane & 1) at[n + __popc(bits & ((1u << lane) - 1))] = (uint16_t)(k*32 + lane);
    n += __popc(bits);
  }
  if (threadIdx.x == 255) all = n;
  __syncthreads();
  for (int i = threadIdx.x; i < all; i += 256) one<T, what>(j, block*BLOCK + at[i], c.before[block] + i);
}

template <class T, int what> __global__ void __launch_bounds__(256, 4) work(const __grid_constant__ Table t) {
  for (int64_t b = blockIdx.x; b < t.first[t.n]; b += gridDim.x) {
    int n = 0;
    while (b >= t.first[n + 1]) n++;
    const Job& j = t.jobs[n];
    int64_t block = b - t.first[n];
    if (j.chosen.bits) { by_bits<T, what>(j, block); continue; }
    int64_t end = block*BLOCK + BLOCK < j.chosen.count ? block*BLOCK + BLOCK : j.chosen.count;
    for (int64_t i = block*BLOCK + threadIdx.x; i < end; i += blockDim.x) one<T, what>(j, place(j.chosen, i), i);
  }
}

template <class T> static void launch(const Table& t, int what, cudaStream_t s) {
  int64_t blocks = t.first[t.n];
  int grid = (int)(blocks < FTLAB_GRID ? blocks : FTLAB_GRID);
  if (what == LIST) FTLAB_LAUNCH((work<T, LIST>), grid, 256, s, t);
  else if (what == ADD) FTLAB_LAUNCH((work<T, ADD>), grid, 256, s, t);
  else if (what == DENSE) FTLAB_LAUNCH((work<T, DENSE>), grid, 256, s, t);
  else FTLAB_LAUNCH((work<T, LISTED>), grid, 256, s, t);
}

extern "C" int ftlab_adamw(const Table* t, int type, int what, void* stream) {
  auto s = (cudaStream_t)stream;
  if (type == TYPE_F32) launch<F32>(*t, what, s);
  else if (type == TYPE_BF16) launch<BF16>(*t, what, s);
  else launch<F16>(*t, what, s);
  return (int)cudaGetLastError();
}
