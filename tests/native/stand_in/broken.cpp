// Kernels with a mistake each, to see that the stand-in and the sanitizers find it: broken [which]
#include "../cuda_shim.h"

__global__ void __launch_bounds__(64) turn(int* x, int wrong) {  // each thread takes its neighbour's number
  __shared__ int all[64];
  all[threadIdx.x] = x[threadIdx.x];
  if (wrong != 1) __syncthreads();  // 1: no barrier
  x[threadIdx.x] = all[(threadIdx.x + 1) % 64];
  if (wrong == 2 && threadIdx.x % 2) __syncthreads();  // 2: a barrier for some
}
__global__ void add(int* sum, int wrong) {
  if (wrong == 3) *sum += 1;  // 3: two blocks, one place, no atomic
  else if (threadIdx.x == 0) atomicAdd(sum, 1);
}
__global__ void put(int* x, int n, int wrong) {
  int i = (int)(blockIdx.x*blockDim.x + threadIdx.x);
  if (i < n || wrong == 4) x[i] = i;  // 4: beyond the end
}
__global__ void fresh(int* out, int wrong) {  // 5: shared memory that is taken to be 0
  __shared__ int sum;
  if (wrong != 5 && threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
__global__ void lanes(int* x, int wrong) {
  __shared__ int all[64];
  int v = x[threadIdx.x];
  all[threadIdx.x] = v;
  if (wrong != 6 || threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);  // 6: a shuffle for half a warp
  v = __shfl_down_sync(0xffffffffu, v, 2);  // the last two keep what they have
  x[threadIdx.x] = wrong == 7 ? all[threadIdx.x ^ 1] : v;  // 7: a shuffle taken for a barrier
}

int main(int, char** a) {
  int wrong = atoi(a[1]), bad = 0;
  std::vector<int> x(64), y(100), z(9);
  int sum = 0;
  for (int i = 0; i < 64; i++) x[i] = i;
  int *p = x.data(), *q = y.data(), *r = z.data(), *s = &sum;
  FTLAB_LAUNCH(turn, 1, 64, 0, p, wrong);
  for (int i = 0; i < 64; i++) bad |= x[i] != (i + 1) % 64;
  FTLAB_LAUNCH(add, 4, wrong == 3 ? 1 : 32, 0, s, wrong);
  bad |= sum != 4;
  FTLAB_LAUNCH(put, 4, 32, 0, q, 100, wrong);
  FTLAB_LAUNCH(fresh, 9, 32, 0, r, wrong);
  for (int n : z) bad |= n != 32;
  for (int i = 0; i < 64; i++) x[i] = i;
  FTLAB_LAUNCH(lanes, 1, 64, 0, p, wrong);
  for (int i = 0; i < 64; i++) bad |= wrong != 7 && x[i] != ((i % 32 < 30 ? i + 2 : i) ^ 1);
  puts(bad ? "wrong" : "ok");
  return bad;
}
