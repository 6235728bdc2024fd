// A row of logits: what it charges for its label, how undecided it is, how far from another row; and what a change of it would cost.
// Nothing here knows torch, so that sanitizers can run it alone.
#pragma once
#include "common.h"

namespace ftlab {
namespace crossentropy {

// e^x for x <= 0 (and NaN): x is n*log 2 and a rest, whose exponential is a polynomial (Cephes' expf). Below the smallest normal
// number it is 0. n is found by adding a number so large that no binary places are left: no conversion, and NaN stays NaN.
FTLAB_HD float exp_(float x) {
  float shifted = x*1.44269504088896341f + 12582912.f, n = shifted - 12582912.f;
  float r = (x - n*0.693359375f) + n*2.12194440e-4f, r2 = r*r;
  float p = (1.9875691500e-4f*r + 1.3981999507e-3f)*r2 + (8.3334519073e-3f*r + 4.1665795894e-2f);
  float y = (p*r2 + (1.6666665459e-1f*r + 5.0000001201e-1f))*r2 + r + 1.f;
  float scaled = y*number((bits(shifted) << 23) + 0x3f800000u);
  return x < -87.33654f ? 0.f : scaled;
}
FTLAB_HD float times(float e, float d) { return e == 0.f ? 0.f : e*d; }  // nothing times minus infinity is nothing: what never happens costs nothing

// What is known of a row x, and of a row y that it is held against: log-probabilities are x - top - log(sum)
struct Row { float top, sum, other_top, other_sum; };
struct Sums { double x, entropy, y, apart; };  // of e^(x - top), of that times (x - top), of e^(y - other_top), of what KL averages

// d/dx of weight*nll + kl*KL, but for the label's place. `reverse`: KL(x || y), else KL(y || x)
struct Slope { float weight, kl, apart, x, y, shift; };  // apart: the row's KL; x and y: 1/sum, 1/other_sum; shift: log(other_sum) - log(sum)
FTLAB_HD float slope(float x, const Row& r, const Slope& s) { return s.weight*(exp_(x - r.top)*s.x); }
template <bool reverse> FTLAB_HD float slope(float x, float y, const Row& r, const Slope& s) {
  float dx = x - r.top, dy = y - r.other_top, p = exp_(dx)*s.x;
  return s.weight*p + s.kl*(reverse ? times(p, (dx - dy + s.shift) - s.apart) : p - exp_(dy)*s.y);
}
// What a word adds to Sums::apart; ey is e^dy
template <bool reverse> FTLAB_HD float apart(float dx, float dy, float ey) { return reverse ? times(exp_(dx), dx - dy) : times(ey, dy - dx); }

// A row's answers, in doubles, as they are worked out but once: how surprised it is by the label, its entropy, its KL
struct Price { float nll, entropy, kl; };
FTLAB_HD Price price(const Sums& s, const Row& r, float label, bool reverse) {
  double own = log(s.x), other = log(s.y);
  double kl = reverse ? s.apart/s.x + other - own : s.apart/s.y + own - other;
  return {(float)(own - (double)(label - r.top)), (float)(own - s.entropy/s.x), (float)kl};
}

// Rows of n logits each, and what is known of them: `out` holds, one after another, all rows' nll, all their entropies, and so on
enum { NLL, ENTROPY, TOP, SUM, KL, OTHER_TOP, OTHER_SUM };
struct Rows { void* x; const void* y; const int64_t* labels; float* out; int64_t n, rows; bool reverse; const float* weight; float kl; };
FTLAB_HD void keep(const Rows& k, int64_t i, const Row& r, const Price& p) {
  float* o = k.out + i;
  o[NLL*k.rows] = p.nll; o[ENTROPY*k.rows] = p.entropy; o[TOP*k.rows] = r.top; o[SUM*k.rows] = r.sum;
  if (k.y) { o[KL*k.rows] = p.kl; o[OTHER_TOP*k.rows] = r.other_top; o[OTHER_SUM*k.rows] = r.other_sum; }
}
FTLAB_HD Row kept(const Rows& k, int64_t i, Slope& s) {
  const float* o = k.out + i;
  Row r{o[TOP*k.rows], o[SUM*k.rows], k.y ? o[OTHER_TOP*k.rows] : 0, k.y ? o[OTHER_SUM*k.rows] : 1};
  float shift = k.y && k.reverse ? (float)(log((double)r.other_sum) - log((double)r.sum)) : 0;
  s = {k.weight[i], k.kl, k.y ? o[KL*k.rows] : 0, 1/r.sum, 1/r.other_sum, shift};
  return r;
}

#ifndef __CUDACC__
constexpr int SIDE = 32, STRIP = 64*SIDE;  // 32 sums side by side, emptied into doubles every 64 steps: the same order on every processor

template <class T> FTLAB_HD float top(const typename T::type* x, int64_t n) {
  alignas(64) float m[SIDE];
  for (int j = 0; j < SIDE; j++) m[j] = -INFINITY;
  int64_t i = 0;
  for (; i + SIDE <= n; i += SIDE)
#pragma omp simd
    for (int j = 0; j < SIDE; j++) { float v = T::in(x[i + j]); m[j] = v > m[j] ? v : m[j]; }
  for (; i < n; i++) { float v = T::in(x[i]); m[0] = v > m[0] ? v : m[0]; }
  for (int j = 1; j < SIDE; j++) m[0] = m[j] > m[0] ? m[j] : m[0];
  return m[0];  // NaN is passed over here, and makes the sums NaN
}

template <class T> FTLAB_HD void add(const typename T::type* x, int64_t n, const Row& r, Sums& s) {
  alignas(64) float a[SIDE] = {}, b[SIDE] = {};
  int64_t i = 0;
  for (; i + SIDE <= n; i += SIDE)
#pragma omp simd
    for (int j = 0; j < SIDE; j++) { float d = T::in(x[i + j]) - r.top, e = exp_(d); a[j] += e; b[j] += times(e, d); }
  for (; i < n; i++) { float d = T::in(x[i]) - r.top, e = exp_(d); a[i % SIDE] += e; b[i % SIDE] += times(e, d); }
  for (int j = 0; j < SIDE; j++) { s.x += a[j]; s.entropy += b[j]; }
}
template <class T, bool reverse> FTLAB_HD void add(const typename T::type* x, const typename T::type* y, int64_t n, const Row& r, Sums& s) {
  alignas(64) float a[SIDE] = {}, b[SIDE] = {};
  int64_t i = 0;
  for (; i + SIDE <= n; i += SIDE)
#pragma omp simd
    for (int j = 0; j < SIDE; j++) {
      float dx = T::in(x[i + j]) - r.top, dy = T::in(y[i + j]) - r.other_top, e = exp_(dy);
      a[j] += e; b[j] += apart<reverse>(dx, dy, e);
    }
  for (; i < n; i++) {
    float dx = T::in(x[i]) - r.top, dy = T::in(y[i]) - r.other_top, e = exp_(dy);
    a[i % SIDE] += e; b[i % SIDE] += apart<reverse>(dx, dy, e);
  }
  for (int j = 0; j < SIDE; j++) { s.y += a[j]; s.apart += b[j]; }
}

template <class T> FTLAB_HD void price_rows(const Rows& k, int64_t begin, int64_t end) {
  typedef const typename T::type* P;
  for (int64_t i = begin; i < end; i++) {
    P x = (P)k.x + i*k.n, y = k.y ? (P)k.y + i*k.n : nullptr;
    Row r{top<T>(x, k.n), 1, y ? top<T>(y, k.n) : 0, 1};
    Sums s{0, 0, y ? 0. : 1., 0};
    for (int64_t at = 0; at < k.n; at += STRIP) {
      int64_t left = k.n - at < STRIP ? k.n - at : STRIP;
      add<T>(x + at, left, r, s);
      if (y && k.reverse) add<T, true>(x + at, y + at, left, r, s);
      else if (y) add<T, false>(x + at, y + at, left, r, s);
    }
    r.sum = (float)s.x; r.other_sum = (float)s.y;
    keep(k, i, r, price(s, r, T::in(x[k.labels[i]]), k.reverse));
  }
}

template <class T, bool reverse> FTLAB_HD void slopes(typename T::type* x, const typename T::type* y, int64_t n, const Row& r, const Slope& s, int64_t label) {
  float there = slope<reverse>(T::in(x[label]), T::in(y[label]), r, s) - s.weight;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) x[j] = T::out(slope<reverse>(T::in(x[j]), T::in(y[j]), r, s));
  x[label] = T::out(there);
}
template <class T> FTLAB_HD void slopes(typename T::type* x, int64_t n, const Row& r, const Slope& s, int64_t label) {
  float there = slope(T::in(x[label]), r, s) - s.weight;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) x[j] = T::out(slope(T::in(x[j]), r, s));
  x[label] = T::out(there);
}
template <class T> FTLAB_HD void slope_rows(const Rows& k, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    auto* x = (typename T::type*)k.x + i*k.n;
    auto* y = k.y ? (const typename T::type*)k.y + i*k.n : nullptr;
    Slope s;
    Row r = kept(k, i, s);
    if (!y) slopes<T>(x, k.n, r, s, k.labels[i]);
    else if (k.reverse) slopes<T, true>(x, y, k.n, r, s, k.labels[i]);
    else slopes<T, false>(x, y, k.n, r, s, k.labels[i]);
  }
}

typedef void (*Run)(const Rows&, int64_t, int64_t);
#define FTLAB_CE(NAME, TARGET, WHAT, T) TARGET inline void NAME(const Rows& k, int64_t begin, int64_t end) { WHAT<T>(k, begin, end); }
#define FTLAB_CES(ISA, TARGET) \
  FTLAB_CE(price_f32_##ISA, TARGET, price_rows, F32) FTLAB_CE(slope_f32_##ISA, TARGET, slope_rows, F32) \
  FTLAB_CE(price_bf16_##ISA, TARGET, price_rows, BF16) FTLAB_CE(slope_bf16_##ISA, TARGET, slope_rows, BF16) \
  FTLAB_CE(price_f16_##ISA, TARGET, price_rows, F16) FTLAB_CE(slope_f16_##ISA, TARGET, slope_rows, F16) \
  static const Run ISA##_runs[2][3] = {{price_f32_##ISA, price_bf16_##ISA, price_f16_##ISA}, {slope_f32_##ISA, slope_bf16_##ISA, slope_f16_##ISA}};
FTLAB_CES(plain, )
FTLAB_CES(avx2, FTLAB_AVX2)
FTLAB_CES(avx512, FTLAB_AVX512)
inline Run run_of(bool slopes, int type, int set) { return (set == 2 ? avx512_runs : set == 1 ? avx2_runs : plain_runs)[slopes][type]; }
#endif

}  // namespace crossentropy
}  // namespace ftlab
