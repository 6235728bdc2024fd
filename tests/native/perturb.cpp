// The noise on the CPU alone, on buffers of exactly the needed size, for the address and undefined-behaviour sanitizers
#include <cstdio>
#include <random>
#include <vector>
#include "perturb.h"
using namespace ftlab;

template <class T> static bool perturb_equal(int kind, int type, int64_t n, bool low, uint64_t seed, int64_t cut) {
  std::vector<std::vector<T>> p;
  std::vector<std::vector<int16_t>> rest;
  for (int set = 0; set <= isa(); set++) {  // every instruction set moves a copy, in two parts
    std::mt19937 r((unsigned)seed);
    std::vector<T> q(n);
    std::vector<int16_t> l(low ? n : 0);
    for (auto& x : q) {
      float f = std::normal_distribution<float>()(r);
      x = sizeof(T) == 4 ? (T)f : (T)(bits(f) >> 16);
    }
    Move m{seed, seed >> 7, .01f, .999f};
    int64_t all = tiles(n, kind);
    Range run = range_of(kind, type, set);
    run(q.data(), low ? l.data() : nullptr, n, 0, cut % (all + 1), m);
    run(q.data(), low ? l.data() : nullptr, n, cut % (all + 1), all, m);
    p.push_back(q); rest.push_back(l);
  }
  for (auto& q : p) if (memcmp(q.data(), p[0].data(), n*sizeof(T))) return false;
  for (auto& l : rest) if (l != rest[0]) return false;
  return true;
}

int main() {
  std::mt19937_64 r(1);
  for (int i = 0; i < 1500; i++) {
    int64_t n = r() % (i % 3 ? 700 : 20000), cut = (int64_t)(r() >> 40);
    int kind = r() % 2, type = r() % 3;
    bool low = type == TYPE_BF16 && r() % 2;
    bool ok = type == TYPE_F32 ? perturb_equal<float>(kind, type, n, false, r(), cut) : perturb_equal<uint16_t>(kind, type, n, low, r(), cut);
    if (!ok) { printf("instruction sets differ: n %lld, kind %d, type %d\n", (long long)n, kind, type); return 1; }
  }
  puts("ok");
}
