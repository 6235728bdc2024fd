// What the .cu files share: the CUDA runtime, one way to start a kernel, and reading and writing 16 bytes at a time.
// A stand-in for runtime and start (tests/native/cuda_shim.h) runs the kernels on a processor; it is included first and defines the macro.
#pragma once
#ifndef FTLAB_LAUNCH
#include <cuda_runtime.h>
#define FTLAB_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
#endif
#ifndef FTLAB_GRID
#define FTLAB_GRID 65536  // the most blocks that a kernel gets; what is more, they take in turns
#endif
#include <cstdint>

namespace ftlab {

template <class V> struct alignas(16) Eight { V v[8]; };

// Of eight numbers side by side the first n, and zeros; a tensor that begins anywhere is read number by number
template <class V> __device__ Eight<V> load(const V* x, int64_t n) {
  if (n >= 8 && (uintptr_t)x % 16 == 0) return *(const Eight<V>*)x;
  Eight<V> e{};
  for (int i = 0; i < 8; i++) if (i < n) e.v[i] = x[i];
  return e;
}
template <class V> __device__ void store(V* x, int64_t n, const Eight<V>& e) {
  if (n >= 8 && (uintptr_t)x % 16 == 0) *(Eight<V>*)x = e;
  else for (int i = 0; i < 8; i++) if (i < n) x[i] = e.v[i];
}

}  // namespace ftlab
