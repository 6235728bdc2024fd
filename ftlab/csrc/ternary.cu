// The same on a GPU: a thread is a byte of each plane, eight numbers that lie side by side, read and written 16 bytes at a time.
#include "cuda.h"
#include "ternary.h"
using namespace ftlab;

template <class T> __global__ void __launch_bounds__(256) add_ternary(typename T::type* w, int64_t n, const ternary::Sum v) {
  int64_t step = (int64_t)gridDim.x*blockDim.x;
  for (int64_t b = (int64_t)blockIdx.x*blockDim.x + threadIdx.x; b*8 < n; b += step) {
    auto e = load(w + b*8, n - b*8);
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int64_t j = 0; j < v.count; j++) {
      uint32_t p = v.positive[j][b], m = v.negative[j][b];
      for (int i = 0; i < 8; i++) sum[i] += ternary::term(p << (31 - i), m << (31 - i), v.scale[j]);
    }
    for (int i = 0; i < 8; i++) e.v[i] = T::out(T::in(e.v[i]) + sum[i]);
    store(w + b*8, n - b*8, e);
  }
}

template <class T> __global__ void __launch_bounds__(256) pack_signs(const typename T::type* x, int64_t n, uint8_t* positive, uint8_t* negative) {
  int64_t step = (int64_t)gridDim.x*blockDim.x;
  for (int64_t b = (int64_t)blockIdx.x*blockDim.x + threadIdx.x; b*8 < n; b += step) {
    auto e = load(x + b*8, n - b*8);  // beyond the end there are zeros, whose bits are 0
    uint32_t p = 0, m = 0;
    for (int i = 0; i < 8; i++) { p |= (uint32_t)ternary::above<T>(e.v[i]) << i; m |= (uint32_t)ternary::below<T>(e.v[i]) << i; }
    positive[b] = (uint8_t)p; negative[b] = (uint8_t)m;
  }
}

static int blocks(int64_t n) { int64_t need = (n + 2047)/2048; return (int)(need < FTLAB_GRID ? need : FTLAB_GRID); }

template <class T> static void add_on(void* w, int64_t n, const ternary::Sum& v, cudaStream_t s) {
  FTLAB_LAUNCH(add_ternary<T>, blocks(n), 256, s, (typename T::type*)w, n, v);
}
extern "C" int ftlab_add_ternary(void* w, int64_t n, int type, const ternary::Sum* v, void* stream) {
  if (n == 0) return 0;  // a grid of no blocks is an error
  auto s = (cudaStream_t)stream;
  if (type == TYPE_F32) add_on<F32>(w, n, *v, s);
  else if (type == TYPE_BF16) add_on<BF16>(w, n, *v, s);
  else add_on<F16>(w, n, *v, s);
  return (int)cudaGetLastError();
}

template <class T> static void pack_on(const void* x, int64_t n, uint8_t* positive, uint8_t* negative, cudaStream_t s) {
  FTLAB_LAUNCH(pack_signs<T>, blocks(n), 256, s, (const typename T::type*)x, n, positive, negative);
}
extern "C" int ftlab_pack_signs(const void* x, int64_t n, int type, uint8_t* positive, uint8_t* negative, void* stream) {
  if (n == 0) return 0;
  auto s = (cudaStream_t)stream;
  if (type == TYPE_F32) pack_on<F32>(x, n, positive, negative, s);
  else if (type == TYPE_BF16) pack_on<BF16>(x, n, positive, negative, s);
  else pack_on<F16>(x, n, positive, negative, s);
  return (int)cudaGetLastError();
}
