// The same on a GPU: a block of threads is a row. Its logits are read twice for the price, the second time out of the cache.
#include "cuda.h"
#include "crossentropy.h"
using namespace ftlab;
using namespace ftlab::crossentropy;

constexpr int THREADS = 256, WARPS = THREADS/32;

// One value of all threads, known to all; `room` holds a value for each warp
template <class V, class F> __device__ V together(V v, V* room, F f) {
  for (int o = 16; o; o /= 2) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
  if (threadIdx.x % 32 == 0) room[threadIdx.x/32] = v;
  __syncthreads();
  v = room[0];
  for (int w = 1; w < WARPS; w++) v = f(v, room[w]);
  __syncthreads();
  return v;
}
__device__ float top_of(float m, float* room) { return together(m, room, [](float a, float b) { return a > b ? a : b; }); }
__device__ double sum_of(double v, double* room) { return together(v, room, [](double a, double b) { return a + b; }); }

template <class T, bool with_y, bool reverse> __global__ void __launch_bounds__(THREADS) prices(Rows k) {
  __shared__ float tops[WARPS];
  __shared__ double room[WARPS];
  for (int64_t i = blockIdx.x; i < k.rows; i += gridDim.x) {
    auto* x = (const typename T::type*)k.x + i*k.n;
    auto* y = (const typename T::type*)k.y + (with_y ? i*k.n : 0);
    float mx = -INFINITY, my = -INFINITY;
    for (int64_t j = threadIdx.x; j < k.n; j += THREADS) {
      float v = T::in(x[j]);
      mx = v > mx ? v : mx;
      if (with_y) { float u = T::in(y[j]); my = u > my ? u : my; }
    }
    Row r{top_of(mx, tops), 1, with_y ? top_of(my, tops) : 0, 1};
    float a = 0, b = 0, c = 0, d = 0;
    for (int64_t j = threadIdx.x; j < k.n; j += THREADS) {
      float dx = T::in(x[j]) - r.top, e = exp_(dx);
      a += e; b += times(e, dx);
      if (with_y) { float dy = T::in(y[j]) - r.other_top, ey = exp_(dy); c += ey; d += apart<reverse>(dx, dy, ey); }
    }
    Sums s{sum_of(a, room), sum_of(b, room), with_y ? sum_of(c, room) : 1., with_y ? sum_of(d, room) : 0.};
    if (threadIdx.x == 0) {
      r.sum = (float)s.x; r.other_sum = (float)s.y;
      keep(k, i, r, price(s, r, T::in(x[k.labels[i]]), reverse));
    }
  }
}

template <class T, bool with_y, bool reverse> __global__ void __launch_bounds__(THREADS) gradient(Rows k) {
  for (int64_t i = blockIdx.x; i < k.rows; i += gridDim.x) {
    auto* x = (typename T::type*)k.x + i*k.n;
    auto* y = (const typename T::type*)k.y + (with_y ? i*k.n : 0);
    Slope s;
    Row r = kept(k, i, s);
    int64_t label = k.labels[i];
    for (int64_t j = threadIdx.x; j < k.n; j += THREADS) {
      float g = with_y ? slope<reverse>(T::in(x[j]), T::in(y[j]), r, s) : slope(T::in(x[j]), r, s);
      x[j] = T::out(j == label ? g - s.weight : g);
    }
  }
}

template <class T> static void launch(const Rows& k, bool slopes, cudaStream_t s) {
  int grid = (int)(k.rows < FTLAB_GRID ? k.rows : FTLAB_GRID);
  if (slopes && !k.y) FTLAB_LAUNCH((gradient<T, false, false>), grid, THREADS, s, k);
  else if (slopes && k.reverse) FTLAB_LAUNCH((gradient<T, true, true>), grid, THREADS, s, k);
  else if (slopes) FTLAB_LAUNCH((gradient<T, true, false>), grid, THREADS, s, k);
  else if (!k.y) FTLAB_LAUNCH((prices<T, false, false>), grid, THREADS, s, k);
  else if (k.reverse) FTLAB_LAUNCH((prices<T, true, true>), grid, THREADS, s, k);
  else FTLAB_LAUNCH((prices<T, true, false>), grid, THREADS, s, k);
}
static int run(const Rows& k, bool slopes, int type, void* stream) {
  if (k.rows == 0) return 0;  // a grid of no blocks is an error
  auto s = (cudaStream_t)stream;
  if (type == TYPE_F32) launch<F32>(k, slopes, s);
  else if (type == TYPE_BF16) launch<BF16>(k, slopes, s);
  else launch<F16>(k, slopes, s);
  return (int)cudaGetLastError();
}
extern "C" int ftlab_row_stats(const Rows* k, int type, void* stream) { return run(*k, false, type, stream); }
extern "C" int ftlab_row_gradient(const Rows* k, int type, void* stream) { return run(*k, true, type, stream); }
