// What selection on a processor and on a GPU share: the key of a number, and which numbers a cut chooses
#pragma once
#include "common.h"

namespace ftlab {

// Key of a number: its bits without the sign. All NaN share one key above infinity's, as torch sorts them last.
struct K32 { typedef uint32_t type; static constexpr uint32_t NAN_ = 0x7f800001u; };
struct KB16 { typedef uint16_t type; static constexpr uint32_t NAN_ = 0x7f81u; };
struct KF16 { typedef uint16_t type; static constexpr uint32_t NAN_ = 0x7c01u; };
template <class K> FTLAB_HD uint32_t key_of(typename K::type v) {
  uint32_t key = v & (sizeof(v) == 4 ? 0x7fffffffu : 0x7fffu);
  return key < K::NAN_ ? key : K::NAN_;
}

// What is chosen: keys above `low`, the first `take` keys (by index) equal to it, and of these not what lies above `high`,
// nor the first `skip` keys equal to `high`. `seen` counts the equal ones that came before, in all tensors together.
struct Cut { uint32_t low, high; int64_t take, skip; };
struct Seen { int64_t low, high; };
template <class K> FTLAB_HD bool chosen(typename K::type v, const Cut& c, Seen& s) {
  uint32_t key = key_of<K>(v);
  bool above = key > c.low, below = key < c.high;
  if (key == c.low) above = s.low++ < c.take;
  if (key == c.high) below = s.high++ >= c.skip;
  return above && below;
}

// How many numbers are equal to either cut, and how many lie strictly between: what each part must know of those before it
struct Count { int64_t between, low, high; };
FTLAB_HD Count& operator+=(Count& a, const Count& b) { a.between += b.between; a.low += b.low; a.high += b.high; return a; }
FTLAB_HD Count operator-(const Count& a, const Count& b) { return {a.between - b.between, a.low - b.low, a.high - b.high}; }

// How many are chosen before a place, by what came before it: those between, the equal ones that were taken, those that were not skipped;
// where both cuts are one key, what is chosen are the equal ones from `skip` to `take`
FTLAB_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FTLAB_HD int64_t chosen_before(const Count& n, const Cut& c) {
  int64_t taken = least(n.low, c.take);
  if (c.low == c.high) return taken > c.skip ? taken - c.skip : 0;
  return n.between + taken + (n.high > c.skip ? n.high - c.skip : 0);
}

// Tensors cut into parts of one size, for a GPU: as many tensors as an argument can hold, their parts counted through from `first[0]`
constexpr int MANY = 96;
struct Parts { int64_t size; int32_t count; const void* x[MANY]; int64_t n[MANY], first[MANY + 1]; };

}  // namespace ftlab
