// AdamW on chosen numbers of a tensor, on the CPU. Nothing here knows torch, so that sanitizers can run it alone.
#pragma once
#include "common.h"

namespace ftlab::adamw {

// One step of one number, in float32, each operation rounded once and in this order: torch, C++ and CUDA agree to the last bit
struct Rates { float rate, root, new1, beta2, new2, eps, decay; };  // rate: lr/(1 - beta1^t); root: 1/sqrt(1 - beta2^t); new: 1 - beta
FTLAB_HD void update(float& p, float g, float& m, float& v, const Rates& r) {
  m = m + r.new1*(g - m);
  v = r.beta2*v + r.new2*g*g;
  p = p*r.decay - r.rate*m/(sqrtf(v)*r.root + r.eps);
}

// Which numbers are chosen, in ascending order. Either *runs*: `runs` of them, each `length` numbers long, run j beginning at
// at[j]*length, and all that again `stride` numbers further on, until `count` numbers are listed. Single places are runs of one
// number, rows of a matrix are runs of its width, columns are single places that come again in every row. Or `bits`, one for each
// of the tensor's `count` numbers, and how many are set before each block of them.
struct Chosen {
  const int32_t* at; const uint8_t* bits; const int64_t* before;
  int64_t count, runs, length, stride;
};
constexpr int BLOCK = 4096, TILE = 512;  // numbers with one entry of `before`; numbers worked on together, in the nearest cache

// The position of number i of a list by runs
FTLAB_HD int64_t over(int64_t a, int64_t b) { return (a | b) >> 32 ? a/b : (int64_t)((uint32_t)a/(uint32_t)b); }  // a GPU divides 64 bits slowly
FTLAB_HD int64_t place(const Chosen& c, int64_t i) {
  if (c.length == 1 && i < c.runs) return c.at[i];
  int64_t turn = over(i, c.runs*c.length), in = i - turn*c.runs*c.length, j = over(in, c.length);
  return turn*c.stride + c.at[j]*c.length + in - j*c.length;
}

// One tensor's work. For a gather p is the dense gradient, and m the list that it is added to.
struct Job { Chosen chosen; void* p; const void* g; float *m, *v; Rates rates; };
enum What { LISTED = 0, DENSE = 1, LIST = 2, ADD = 3 };  // a step on listed gradients, or on dense ones; or dense ones are listed, or added to a list

// As many as fit into the 4 kB of a CUDA launch's arguments; first: how many blocks of work come before each
constexpr int ITEMS = 30;
struct Table {
  int n;
  int64_t first[ITEMS + 1];
  Job jobs[ITEMS];
  void add(const Job& j) { jobs[n] = j; first[n + 1] = first[n] + (j.chosen.count + BLOCK - 1)/BLOCK; n++; }
};
static_assert(sizeof(Table) <= 4096, "a launch takes 4 kB");

#ifndef __CUDACC__
// Positions of the bits that are set in each possible byte
struct Bytes {
  uint8_t set[256][8];
  Bytes() { for (int b = 0; b < 256; b++) for (int j = 0, k = 0; k < 8; k++) { set[b][k] = 0; if (b >> k & 1) set[b][j++] = (uint8_t)k; } }
};
inline const Bytes bytes;

// Numbers begin to end of a list by runs: body.run(position, entry, n) for n neighbours, body.list(base, offsets, entry, n) for places
template <class Body> FTLAB_HD void walk_runs(const Chosen& c, int64_t begin, int64_t end, const Body& body) {
  int64_t per = c.runs*c.length;
  for (int64_t i = begin; i < end;) {
    int64_t turn = i/per, in = i - turn*per, n = end - i;
    if (c.length == 1) {
      n = n < c.runs - in ? n : c.runs - in;
      if (n > TILE) n = TILE;
      body.list(turn*c.stride, c.at + in, i, n);
    } else {
      int64_t j = in/c.length, o = in - j*c.length;
      if (n > c.length - o) n = c.length - o;
      body.run(turn*c.stride + c.at[j]*c.length + o, i, n);
    }
    i += n;
  }
}
// Blocks begin to end of a bit mask. Eight places are stored at once, of which only as many as there are count: no branch to guess wrong,
// as a loop over the set bits would be. They are handed on many at a time, so that many lines of memory are waited for together.
template <class Body> FTLAB_HD void walk_bits(const Chosen& c, int64_t begin, int64_t end, const Body& body) {
  alignas(64) int32_t at[TILE + 8];
  for (int64_t b = begin; b < end; b++) {
    int64_t entry = c.before[b], n = 0, stop = c.count - b*BLOCK < BLOCK ? c.count - b*BLOCK : BLOCK;
    for (int64_t k = 0; k < stop; k += 64) {
      uint64_t word = 0;
      memcpy(&word, c.bits + ((b*BLOCK + k) >> 3), (size_t)(stop - k < 64 ? stop - k + 7 : 64)/8);
      int many = __builtin_popcountll(word);
      if (many <= 8) {
        for (int j = 0; j < 8; j++, word &= word - 1) at[n + j] = (int32_t)k + __builtin_ctzll(word | (uint64_t)1 << 63);
      } else for (int64_t byte = 0, to = n; byte < 64; byte += 8, word >>= 8) {
        for (int j = 0; j < 8; j++) at[to + j] = (int32_t)(k + byte) + bytes.set[word & 255][j];
        to += __builtin_popcountll(word & 255);
      }
      n += many;
      if (n + 64 > TILE || k + 64 >= stop) {
        if (n) body.list(b*BLOCK, at, entry, n);
        entry += n; n = 0;
      }
    }
  }
}
// Units of work: numbers in the list, or blocks of a mask
inline int64_t units(const Chosen& c) { return c.bits ? (c.count + BLOCK - 1)/BLOCK : c.count; }
template <class Body> FTLAB_HD void walk(const Chosen& c, int64_t begin, int64_t end, const Body& body) {
  if (c.bits) walk_bits(c, begin, end, body);
  else walk_runs(c, begin, end, body);
}

// The step; `dense` says that the gradient is as large as the tensor, else it lists the chosen numbers only
template <class T, class G, bool dense> struct Step {
  typename T::type* p; const typename G::type* g; float *m, *v; Rates r;
  FTLAB_HD void run(int64_t at, int64_t i, int64_t n) const {
    typename T::type* q = p + at;
    const typename G::type* h = g + (dense ? at : i);
    float *a = m + i, *b = v + i;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
      float x = T::in(q[k]);
      update(x, G::in(h[k]), a[k], b[k], r);
      q[k] = T::out(x);
    }
  }
  FTLAB_HD void list(int64_t base, const int32_t* at, int64_t i, int64_t n) const {
    alignas(64) float x[TILE], y[TILE];
    typename T::type* q = p + base;
    const typename G::type* h = g + (dense ? base : i);
    float *a = m + i, *b = v + i;
    for (int64_t k = 0; k < n; k++) { x[k] = T::in(q[at[k]]); y[k] = G::in(h[dense ? at[k] : k]); }
#pragma omp simd
    for (int64_t k = 0; k < n; k++) update(x[k], y[k], a[k], b[k], r);
    for (int64_t k = 0; k < n; k++) q[at[k]] = T::out(x[k]);
  }
};
// The chosen numbers of a dense gradient, listed, or added to a list of them
template <class T, bool add> struct Gather {
  float* out; const typename T::type* g;
  FTLAB_HD void run(int64_t at, int64_t i, int64_t n) const {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) out[i + k] = add ? out[i + k] + T::in(g[at + k]) : T::in(g[at + k]);
  }
  FTLAB_HD void list(int64_t base, const int32_t* at, int64_t i, int64_t n) const {
    for (int64_t k = 0; k < n; k++) out[i + k] = add ? out[i + k] + T::in(g[base + at[k]]) : T::in(g[base + at[k]]);
  }
};

typedef void (*Loop)(const Job&, int64_t begin, int64_t end);
#define FTLAB_ADAMW(ISA, TARGET) \
  template <class T, class G, bool dense> TARGET void step_##ISA(const Job& j, int64_t a, int64_t b) { \
    walk(j.chosen, a, b, Step<T, G, dense>{(typename T::type*)j.p, (const typename G::type*)j.g, j.m, j.v, j.rates}); } \
  template <class T, bool add> TARGET void gather_##ISA(const Job& j, int64_t a, int64_t b) { \
    walk(j.chosen, a, b, Gather<T, add>{j.m, (const typename T::type*)j.p}); } \
  static const Loop ISA##_steps[2][3] = {{step_##ISA<F32, F32, false>, step_##ISA<BF16, F32, false>, step_##ISA<F16, F32, false>}, \
                                         {step_##ISA<F32, F32, true>, step_##ISA<BF16, BF16, true>, step_##ISA<F16, F16, true>}}; \
  static const Loop ISA##_gathers[2][3] = {{gather_##ISA<F32, false>, gather_##ISA<BF16, false>, gather_##ISA<F16, false>}, \
                                           {gather_##ISA<F32, true>, gather_##ISA<BF16, true>, gather_##ISA<F16, true>}};
FTLAB_ADAMW(plain, )
FTLAB_ADAMW(avx2, FTLAB_AVX2)
FTLAB_ADAMW(avx512, FTLAB_AVX512)

inline Loop step_of(int type, bool dense, int set) { return (set == 2 ? avx512_steps : set == 1 ? avx2_steps : plain_steps)[dense][type]; }
inline Loop gather_of(int type, bool add, int set) { return (set == 2 ? avx512_gathers : set == 1 ? avx2_gathers : plain_gathers)[add][type]; }
#endif

}  // namespace ftlab::adamw
