// The same on a GPU: a thread is a lane, a warp is a tile, so that a warp's 32 numbers lie side by side in memory.
// Sees the CUDA runtime alone, so it compiles beside any torch; the arithmetic is philox.h, which the CPU tests cover.
#include "cuda.h"
#include "philox.h"
using namespace ftlab;

template <class T> __device__ void add(typename T::type* p, int16_t* low, int64_t i, int64_t n, float z, float scale, float decay) {
  if (i >= n) return;
  if (low) split((join(((uint16_t*)p)[i], low[i]) + scale*z)*decay, ((uint16_t*)p)[i], low[i]);
  else p[i] = T::out((T::in(p[i]) + scale*z)*decay);
}

template <class T, bool signs> __global__ void __launch_bounds__(256)
perturb(typename T::type* p, int16_t* low, int64_t n, uint64_t seed, uint64_t tensor, float scale, float decay) {
  constexpr int64_t size = signs ? SIGNS : NORMALS;
  int64_t step = (int64_t)gridDim.x*blockDim.x;
  for (int64_t c = (int64_t)blockIdx.x*blockDim.x + threadIdx.x; c/LANES*size < n; c += step) {
    uint32_t w[4];
    philox(seed, tensor, (uint64_t)c, w[0], w[1], w[2], w[3]);
    int64_t at = c/LANES*size + c%LANES;
    if (signs) {
      for (int row = 0; row < 128; row++) add<T>(p, low, at + row*LANES, n, number(0x3f800000u | ((w[row & 3] >> (row >> 2)) << 31)), scale, decay);
    } else {
      float z[4];
      normals(w[0], w[1], z[0], z[1]); normals(w[2], w[3], z[2], z[3]);
      for (int j = 0; j < 4; j++) add<T>(p, low, at + j*LANES, n, z[j], scale, decay);
    }
  }
}

template <class T> static void launch(void* p, void* low, int64_t n, int signs, uint64_t seed, uint64_t tensor, float scale, float decay, cudaStream_t s) {
  int64_t size = signs ? SIGNS : NORMALS, lanes = (n + size - 1)/size*LANES, blocks = (lanes + 255)/256;
  int grid = (int)(blocks < FTLAB_GRID ? blocks : FTLAB_GRID);
  auto q = (typename T::type*)p;
  if (signs) FTLAB_LAUNCH((perturb<T, true>), grid, 256, s, q, (int16_t*)low, n, seed, tensor, scale, decay);
  else FTLAB_LAUNCH((perturb<T, false>), grid, 256, s, q, (int16_t*)low, n, seed, tensor, scale, decay);
}

extern "C" int ftlab_perturb(void* p, void* low, int64_t n, int kind, int type, uint64_t seed, uint64_t tensor, float scale, float decay, void* stream) {
  if (n == 0) return 0;  // a grid of no blocks is an error
  auto s = (cudaStream_t)stream;
  if (type == 0) launch<F32>(p, low, n, kind, seed, tensor, scale, decay, s);
  else if (type == 1) launch<BF16>(p, low, n, kind, seed, tensor, scale, decay, s);
  else launch<F16>(p, low, n, kind, seed, tensor, scale, decay, s);
  return (int)cudaGetLastError();
}
