// The same on a GPU, without a word to the host: radix selection on the keys' bits from the top down. A pass counts how many keys that
// begin as found so far go on with each of the next bits, and picks the group that holds the rank; three passes for 32 bits, two for 16.
// Who is chosen is counted for each part, summed up over the parts before, and written: ties go to the lowest index, whatever runs first.
#include "cuda.h"
#include "keys.h"
using namespace ftlab;

constexpr int THREADS = 256, GROUPS = 1 << 11, GRID = FTLAB_GRID < 1056 ? FTLAB_GRID : 1056;  // 8 for each of 132 processors

struct State { int64_t rank; uint32_t prefix; };  // of the keys that begin with `prefix`, the one of this rank is looked for (0: the largest)
struct Work { State states[2]; unsigned long long groups[3][2][GROUPS]; };

__global__ void begin(Work* w, int64_t low, int64_t high) {
  auto* g = &w->groups[0][0][0];
  for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < 3*2*GROUPS; i += gridDim.x*blockDim.x) g[i] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) { w->states[0] = {low, 0}; w->states[1] = {high, 0}; }
}

// Which tensor a part belongs to, and its numbers, from `begin` to `end`
struct Piece { int tensor; int64_t begin, end; };
__device__ Piece piece(const Parts& all, int64_t part) {
  int a = 0, b = all.count;
  while (b - a > 1) { int m = (a + b)/2; if (all.first[m] <= part) a = m; else b = m; }  // of empty tensors, which have no part, the last
  int64_t at = (part - all.first[a])*all.size;
  return {a, at, least(all.n[a], at + all.size)};
}

template <class K, int WAYS> __global__ void __launch_bounds__(THREADS) group(const Parts all, Work* w, int pass, int shift, int bits) {
  __shared__ uint32_t mine[WAYS][GROUPS];
  for (int i = threadIdx.x; i < WAYS*GROUPS; i += THREADS) mine[i/GROUPS][i % GROUPS] = 0;
  __syncthreads();
  uint32_t prefix[WAYS], size = 1u << bits;
  for (int way = 0; way < WAYS; way++) prefix[way] = w->states[way].prefix;
  for (int64_t part = all.first[0] + blockIdx.x; part < all.first[all.count]; part += gridDim.x) {
    Piece p = piece(all, part);
    auto* x = (const typename K::type*)all.x[p.tensor];
    for (int64_t i = p.begin + threadIdx.x*8; i < p.end; i += THREADS*8) {
      auto e = load(x + i, p.end - i);
      for (int j = 0; j < 8; j++) if (i + j < p.end) {
        uint32_t key = key_of<K>(e.v[j]) >> shift;
        for (int way = 0; way < WAYS; way++) if (key >> bits == prefix[way]) atomicAdd(&mine[way][key & (size - 1)], 1u);
      }
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < WAYS*size; i += THREADS) {
    uint32_t way = i/size, n = mine[way][i % size];
    if (n) atomicAdd(&w->groups[pass][way][i % size], (unsigned long long)n);
  }
}

// The sum over this thread and those before it
template <class V> __device__ V sum_up(V v, V* all) {
  __syncthreads();  // whoever still reads the last sums
  all[threadIdx.x] = v;
  for (int d = 1; d < THREADS; d *= 2) {
    __syncthreads();
    V more = threadIdx.x >= (unsigned)d ? all[threadIdx.x - d] : V{};
    __syncthreads();
    all[threadIdx.x] += more;
  }
  __syncthreads();
  return all[threadIdx.x];
}

// A block for each way: the group that holds the rank. Thread 0 has the uppermost groups. In the first pass all ways share one count.
__global__ void __launch_bounds__(THREADS) narrow(Work* w, int pass, int bits) {
  __shared__ int64_t sums[THREADS];
  State s = w->states[blockIdx.x];
  const unsigned long long* groups = w->groups[pass][pass == 0 ? 0 : blockIdx.x];
  int size = 1 << bits, each = (size + THREADS - 1)/THREADS, top = size - (int)threadIdx.x*each;
  int64_t mine = 0;
  for (int g = top - 1; g >= 0 && g >= top - each; g--) mine += (int64_t)groups[g];
  int64_t before = sum_up(mine, sums) - mine;
  if (s.rank < before || s.rank >= before + mine) return;
  int g = top - 1;
  while (before + (int64_t)groups[g] <= s.rank) before += (int64_t)groups[g--];
  w->states[blockIdx.x] = {s.rank - before, s.prefix << bits | (uint32_t)g};
}

__global__ void finish(const Work* w, int ways, int64_t* found) {
  found[0] = w->states[0].prefix; found[2] = w->states[0].rank + 1;
  found[1] = ways == 2 ? w->states[1].prefix : 0x7fffffffu; found[3] = ways == 2 ? w->states[1].rank + 1 : 0;
}

template <class K> static void find(const Parts* all, int batches, int64_t low, int64_t high, Work* w, int64_t* found, cudaStream_t s) {
  constexpr int PASSES = sizeof(typename K::type) == 4 ? 3 : 2, BITS[2][3] = {{11, 4, 0}, {11, 10, 10}};
  int ways = high < 0 ? 1 : 2, left = PASSES == 3 ? 31 : 15;
  FTLAB_LAUNCH(begin, 16, THREADS, s, w, low, high);
  for (int pass = 0; pass < PASSES; pass++) {
    int bits = BITS[PASSES - 2][pass];
    left -= bits;
    for (int b = 0; b < batches; b++) {
      int64_t parts = all[b].first[all[b].count] - all[b].first[0];
      int grid = (int)least(GRID, parts);
      if (grid && (ways == 1 || pass == 0)) FTLAB_LAUNCH((group<K, 1>), grid, THREADS, s, all[b], w, pass, left, bits);
      else if (grid) FTLAB_LAUNCH((group<K, 2>), grid, THREADS, s, all[b], w, pass, left, bits);
    }
    FTLAB_LAUNCH(narrow, ways, THREADS, s, w, pass, bits);
  }
  FTLAB_LAUNCH(finish, 1, 1, s, w, ways, found);
}

__device__ Cut cut_of(const int64_t* f) { return {(uint32_t)f[0], (uint32_t)f[1], f[2], f[3]}; }

template <class K> __device__ Count among(const Eight<typename K::type>& e, int64_t n, const Cut& c) {
  Count o{0, 0, 0};
  for (int j = 0; j < 8; j++) if (j < n) {
    uint32_t key = key_of<K>(e.v[j]);
    o.between += (key > c.low) & (key < c.high); o.low += key == c.low; o.high += key == c.high;
  }
  return o;
}

// A block counts a part at a time
template <class K> __global__ void __launch_bounds__(THREADS) tell(const Parts all, const int64_t* found, Count* counts) {
  __shared__ Count sums[THREADS];
  Cut c = cut_of(found);
  for (int64_t part = all.first[0] + blockIdx.x; part < all.first[all.count]; part += gridDim.x) {
    Piece p = piece(all, part);
    auto* x = (const typename K::type*)all.x[p.tensor];
    Count n{0, 0, 0};
    for (int64_t i = p.begin + threadIdx.x*8; i < p.end; i += THREADS*8) n += among<K>(load(x + i, p.end - i), p.end - i, c);
    n = sum_up(n, sums);
    if (threadIdx.x == THREADS - 1) counts[part] = n;
  }
}

// One block: each part's count becomes what came before it; one entry more holds all
__global__ void __launch_bounds__(THREADS) before(Count* counts, int64_t parts) {
  __shared__ Count sums[THREADS];
  Count sum{0, 0, 0};
  for (int64_t i = 0; i <= parts; i += THREADS) {
    int64_t at = i + threadIdx.x;
    Count n = at < parts ? counts[at] : Count{0, 0, 0}, upto = sum_up(n, sums), here = sum;
    here += upto - n;
    if (at <= parts) counts[at] = here;
    sum += sums[THREADS - 1];
  }
}

__global__ void totals(const Parts all, const int64_t* found, const Count* counts, int64_t* out) {
  Cut c = cut_of(found);
  for (int j = threadIdx.x; j < all.count; j += blockDim.x) out[j] = chosen_before(counts[all.first[j + 1]], c) - chosen_before(counts[all.first[j]], c);
}

// What is chosen, as bits or as indices. What came before a thread's eight numbers tells which of the equal ones are in, and where to write.
struct Out { void* to[MANY]; int64_t room[MANY]; uint8_t indices[MANY]; };  // room: how many indices there is place for
template <class K> __global__ void __launch_bounds__(THREADS) put(const Parts all, const int64_t* found, const Count* counts, const Out out) {
  __shared__ Count sums[THREADS];
  Cut c = cut_of(found);
  for (int64_t part = all.first[0] + blockIdx.x; part < all.first[all.count]; part += gridDim.x) {
    Piece p = piece(all, part);
    auto* x = (const typename K::type*)all.x[p.tensor];
    int64_t start = chosen_before(counts[all.first[p.tensor]], c);
    Count sum = counts[part];
    for (int64_t tile = p.begin; tile < p.end; tile += THREADS*8) {
      int64_t i = tile + threadIdx.x*8, left = p.end - i;
      auto e = load(x + i, left);
      Count n = among<K>(e, left, c), here = sum;
      here += sum_up(n, sums) - n;
      sum += sums[THREADS - 1];
      Seen seen{here.low, here.high};
      uint32_t bits = 0;
      for (int j = 0; j < 8; j++) if (j < left) bits |= (uint32_t)chosen<K>(e.v[j], c, seen) << j;
      if (left <= 0) continue;
      int64_t at = chosen_before(here, c) - start;
      if (!out.indices[p.tensor]) ((uint8_t*)out.to[p.tensor])[i/8] = (uint8_t)bits;
      else for (int j = 0; j < 8; j++) if (bits >> j & 1 && at < out.room[p.tensor]) ((int32_t*)out.to[p.tensor])[at++] = (int32_t)(i + j);
    }
  }
}

template <class K> static void count(const Parts* all, int batches, const int64_t* found, Count* counts, cudaStream_t s) {
  for (int b = 0; b < batches; b++) {
    int64_t parts = all[b].first[all[b].count] - all[b].first[0];
    if (parts) FTLAB_LAUNCH(tell<K>, (int)least(GRID, parts), THREADS, s, all[b], found, counts);
  }
  FTLAB_LAUNCH(before, 1, THREADS, s, counts, all[batches - 1].first[all[batches - 1].count]);
}
template <class K> static void write(const Parts* all, int batches, const int64_t* found, Count* counts, void* const* to, const int64_t* room, cudaStream_t s) {
  count<K>(all, batches, found, counts, s);
  for (int b = 0, first = 0; b < batches; first += all[b++].count) {
    int64_t parts = all[b].first[all[b].count] - all[b].first[0];
    Out out{};
    for (int j = 0; j < all[b].count; j++) { out.to[j] = to[first + j]; out.indices[j] = room[first + j] >= 0; out.room[j] = room[first + j]; }
    if (parts) FTLAB_LAUNCH(put<K>, (int)least(GRID, parts), THREADS, s, all[b], found, counts, out);
  }
}

#define FTLAB_TYPES(DO) if (type == TYPE_F32) DO(K32) else if (type == TYPE_BF16) DO(KB16) else DO(KF16)

// Bytes that a search needs
extern "C" int64_t ftlab_kth_work() { return sizeof(Work); }

// low, high: ranks from 0; high -1 where nothing is dropped
extern "C" int ftlab_kth_find(const Parts* all, int batches, int type, int64_t low, int64_t high, void* work, int64_t* found, void* stream) {
#define FTLAB_DO(K) find<K>(all, batches, low, high, (Work*)work, found, (cudaStream_t)stream);
  FTLAB_TYPES(FTLAB_DO)
#undef FTLAB_DO
  return (int)cudaGetLastError();
}

// counts: one for each part, and one more
extern "C" int ftlab_kth_count(const Parts* all, int batches, int type, const int64_t* found, Count* counts, int64_t* out, void* stream) {
#define FTLAB_DO(K) count<K>(all, batches, found, counts, (cudaStream_t)stream);
  FTLAB_TYPES(FTLAB_DO)
#undef FTLAB_DO
  for (int b = 0; b < batches; out += all[b++].count) FTLAB_LAUNCH(totals, 1, THREADS, (cudaStream_t)stream, all[b], found, counts, out);
  return (int)cudaGetLastError();
}

// room: for each tensor -1 for a mask, or how many int32 its output holds
extern "C" int ftlab_kth_write(const Parts* all, int batches, int type, const int64_t* found, Count* counts, void* const* to, const int64_t* room,
                               void* stream) {
#define FTLAB_DO(K) write<K>(all, batches, found, counts, to, room, (cudaStream_t)stream);
  FTLAB_TYPES(FTLAB_DO)
#undef FTLAB_DO
  return (int)cudaGetLastError();
}
