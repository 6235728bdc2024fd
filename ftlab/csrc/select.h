// The k-th largest magnitude, exactly, without sorting and without a copy: narrow down a range of bit patterns until it holds one.
// Cleared of its sign, a float's bits are a whole number that grows with the magnitude, so whole numbers are all that is compared.
#pragma once
#include <algorithm>
#include <vector>
#include "keys.h"

namespace ftlab {

constexpr int BINS = 1 << 14, STRIP = 64;  // a strip: as many keys as are compared before asking which of them count

// 64 flags, a byte each, as 64 bits: the product moves the lowest bits of eight bytes side by side
FTLAB_HD uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0, eight;
  for (int j = 0; j < 8; j++) { memcpy(&eight, flags + 8*j, 8); bits |= (eight*0x0102040810204080u >> 56) << 8*j; }
  return bits;
}

// Of the keys from begin to end: how many are lo + span or more (returned), and how many fall into each bin of [lo, lo + span),
// a bin being 2^shift keys wide. Few fall there, and only they are worked on one by one; the rest goes at the speed of memory.
template <class K> FTLAB_HD int64_t tally(const typename K::type* x, int64_t begin, int64_t end, uint32_t lo, uint32_t span, int shift, uint32_t* bins) {
  int64_t above = 0, i = begin;
  uint32_t top = lo + span;
  alignas(64) uint8_t flags[STRIP];
  for (; i + STRIP <= end; i += STRIP) {
    uint32_t more = 0, inside = 0;
#pragma omp simd reduction(+ : more, inside)
    for (int j = 0; j < STRIP; j++) {
      uint32_t key = key_of<K>(x[i + j]), over = key >= top, in = (key >= lo) & (key < top);
      flags[j] = (uint8_t)in; more += over; inside += in;
    }
    above += more;
    if (inside) for (uint64_t b = bits_of(flags); b; b &= b - 1) bins[(key_of<K>(x[i + __builtin_ctzll(b)]) - lo) >> shift]++;
  }
  for (; i < end; i++) {
    uint32_t key = key_of<K>(x[i]);
    if (key >= top) above++;
    else if (key >= lo) bins[(key - lo) >> shift]++;
  }
  return above;
}

template <class K> FTLAB_HD Count count(const typename K::type* x, int64_t begin, int64_t end, const Cut& c) {
  Count n{0, 0, 0};
  for (int64_t i = begin; i < end;) {
    int64_t stop = std::min(end, i + (1 << 20));
    uint32_t between = 0, low = 0, high = 0;
#pragma omp simd reduction(+ : between, low, high)
    for (int64_t j = i; j < stop; j++) {
      uint32_t key = key_of<K>(x[j]);
      between += (key > c.low) & (key < c.high); low += key == c.low; high += key == c.high;
    }
    n.between += between; n.low += low; n.high += high; i = stop;
  }
  return n;
}

// Which of up to 64 numbers are chosen, as bits. Only a strip with a number equal to a cut is gone through one by one.
template <class K> FTLAB_HD uint64_t strip(const typename K::type* x, int64_t n, const Cut& c, Seen& s) {
  if (n == STRIP) {
    alignas(64) uint8_t flags[STRIP];
    uint32_t equal = 0;
#pragma omp simd reduction(+ : equal)
    for (int j = 0; j < STRIP; j++) {
      uint32_t key = key_of<K>(x[j]);
      flags[j] = (uint8_t)((key > c.low) & (key < c.high)); equal += (key == c.low) | (key == c.high);
    }
    if (!equal) return bits_of(flags);
  }
  uint64_t bits = 0;
  for (int64_t j = 0; j < n; j++) bits |= (uint64_t)chosen<K>(x[j], c, s) << j;
  return bits;
}

// The indices of what is chosen among begin to end: the caller has counted them, and made room
template <class K> FTLAB_HD void indices(const typename K::type* x, int64_t begin, int64_t end, const Cut& c, Seen s, int32_t* out) {
  for (int64_t i = begin; i < end; i += STRIP)
    for (uint64_t b = strip<K>(x + i, std::min<int64_t>(STRIP, end - i), c, s); b; b &= b - 1) *out++ = (int32_t)(i + __builtin_ctzll(b));
}

// The same as a mask: bit j of byte b is number 8b + j; begin is a multiple of 8
template <class K> FTLAB_HD void mask(const typename K::type* x, int64_t begin, int64_t end, const Cut& c, Seen s, uint8_t* out) {
  for (int64_t i = begin; i < end; i += STRIP) {
    int64_t n = std::min<int64_t>(STRIP, end - i);
    uint64_t b = strip<K>(x + i, n, c, s);
    memcpy(out + (i >> 3), &b, (size_t)(n + 7)/8);
  }
}

#define FTLAB_SELECT(ISA, TARGET) \
  template <class K> TARGET int64_t tally_##ISA(const void* x, int64_t a, int64_t b, uint32_t lo, uint32_t span, int shift, uint32_t* bins) { \
    return tally<K>((const typename K::type*)x, a, b, lo, span, shift, bins); } \
  template <class K> TARGET Count count_##ISA(const void* x, int64_t a, int64_t b, const Cut& c) { return count<K>((const typename K::type*)x, a, b, c); } \
  template <class K> TARGET void indices_##ISA(const void* x, int64_t a, int64_t b, const Cut& c, Seen s, int32_t* out) { \
    indices<K>((const typename K::type*)x, a, b, c, s, out); } \
  template <class K> TARGET void mask_##ISA(const void* x, int64_t a, int64_t b, const Cut& c, Seen s, uint8_t* out) { \
    mask<K>((const typename K::type*)x, a, b, c, s, out); } \
  template <class K> TARGET uint32_t key_##ISA(const void* x, int64_t i) { return key_of<K>(((const typename K::type*)x)[i]); }
FTLAB_SELECT(plain, )
FTLAB_SELECT(avx2, FTLAB_AVX2)
FTLAB_SELECT(avx512, FTLAB_AVX512)

struct Select {  // the functions of one type and instruction set
  int64_t (*tally)(const void*, int64_t, int64_t, uint32_t, uint32_t, int, uint32_t*);
  Count (*count)(const void*, int64_t, int64_t, const Cut&);
  void (*indices)(const void*, int64_t, int64_t, const Cut&, Seen, int32_t*);
  void (*mask)(const void*, int64_t, int64_t, const Cut&, Seen, uint8_t*);
  uint32_t (*key)(const void*, int64_t);
  uint32_t keys;  // one more than the largest key
};
template <class K> inline Select select_of(int set) {
  if (set == 2) return {tally_avx512<K>, count_avx512<K>, indices_avx512<K>, mask_avx512<K>, key_avx512<K>, K::NAN_ + 1};
  if (set == 1) return {tally_avx2<K>, count_avx2<K>, indices_avx2<K>, mask_avx2<K>, key_avx2<K>, K::NAN_ + 1};
  return {tally_plain<K>, count_plain<K>, indices_plain<K>, mask_plain<K>, key_plain<K>, K::NAN_ + 1};
}
inline Select select_of(int type, int set) { return type == TYPE_F32 ? select_of<K32>(set) : type == TYPE_BF16 ? select_of<KB16>(set) : select_of<KF16>(set); }

struct Block { const void* x; int64_t n; };  // a tensor
struct Found { uint32_t key; int64_t above; };  // the key of a rank, and how many keys are larger

// For a GPU: parts of at least 16 thousand numbers, and few enough that their counts take less than 2 MB. A size is a multiple of 2048,
// eight numbers for each thread of a block.
inline std::vector<Parts> cut_up(const std::vector<Block>& all, int64_t least_size = 1 << 14) {
  int64_t total = 0, parts = 0;
  for (auto& t : all) total += t.n;
  int64_t size = std::max(least_size, (total/(1 << 15)/2048 + 1)*2048);
  std::vector<Parts> out;
  for (auto& t : all) {
    if (out.empty() || out.back().count == MANY) { out.push_back(Parts{}); out.back().size = size; out.back().first[0] = parts; }
    Parts& p = out.back();
    p.x[p.count] = t.x; p.n[p.count] = t.n;
    parts += (t.n + size - 1)/size;
    p.first[++p.count] = parts;
  }
  return out;
}
inline int64_t parts(const std::vector<Parts>& all) { return all.back().first[all.back().count]; }

// A range of keys that probably holds the rank, from 64 thousand keys: a guess, which the tally confirms or not.
// Sixteen neighbours at a time, as memory hands them over together.
inline void guess(const std::vector<Block>& all, const Select& f, int64_t total, int64_t rank, uint32_t& lo, uint32_t& span) {
  const int64_t want = 1 << 16, near = 16;
  if (total < 8*want) return;
  std::vector<uint32_t> keys;
  keys.reserve(want);
  uint64_t mixed = 1;
  for (auto& t : all) for (int64_t j = 0, spots = (int64_t)((double)t.n*want/near/total); t.n >= near && j < spots; j++) {
    mixed = mixed*6364136223846793005u + 1442695040888963407u;
    int64_t at = (int64_t)((double)(mixed >> 11)*0x1p-53*(double)(t.n - near));
    for (int64_t i = 0; i < near; i++) keys.push_back(f.key(t.x, at + i));
  }
  if ((int64_t)keys.size() < want/2) return;
  double m = (double)keys.size(), p = (double)rank/(double)total, slack = 5*std::sqrt(p*(1 - p)*m) + 16;
  int64_t from = (int64_t)(p*m - slack), to = (int64_t)(p*m + slack);
  auto greater = [](uint32_t a, uint32_t b) { return a > b; };
  uint32_t top = f.keys;
  lo = 0;
  if (from > 0) { std::nth_element(keys.begin(), keys.begin() + from, keys.end(), greater); top = keys[from] + 1; }
  if (to < (int64_t)m) { std::nth_element(keys.begin() + std::max<int64_t>(from, 0), keys.begin() + to, keys.end(), greater); lo = keys[to]; }
  span = top - lo;
}

// The key of the given rank (0: the largest). `parallel(n, grain, body)` calls body(a, b) for parts of 0 to n, at once where it can.
template <class Parallel> Found find(const std::vector<Block>& all, const Select& f, int64_t rank, Parallel parallel) {
  int64_t total = 0;
  for (auto& t : all) total += t.n;
  uint32_t lo = 0, span = f.keys;
  guess(all, f, total, rank, lo, span);
  for (;;) {
    int shift = 0;
    while (((span - 1) >> shift) >= (uint32_t)BINS) shift++;
    std::vector<int64_t> bins(BINS, 0);
    int64_t above = 0;
    for (auto& t : all) parallel(t.n, 1 << 19, [&](int64_t a, int64_t b, auto&& merge) {
      for (int64_t i = a; i < b; i += 1 << 30) {  // in pieces that 32-bit counts can hold
        std::vector<uint32_t> mine(BINS, 0);
        int64_t over = f.tally(t.x, i, std::min(b, i + (1 << 30)), lo, span, shift, mine.data());
        merge([&] { above += over; for (int j = 0; j < BINS; j++) bins[j] += mine[j]; });
      }
    });
    int64_t seen = above;
    int at = BINS - 1;
    while (at >= 0 && seen + bins[at] <= rank) seen += bins[at--];
    if (above > rank || at < 0) { lo = 0; span = f.keys; continue; }  // the guess was wrong: once more, over everything
    lo += (uint32_t)at << shift; span = std::min(span - ((uint32_t)at << shift), 1u << shift);
    if (shift == 0) return {lo, seen};
  }
}

}  // namespace ftlab
