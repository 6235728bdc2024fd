// Packed vectors on the CPU alone, on buffers of exactly the needed size, for the address and undefined-behaviour sanitizers
#include <cstdio>
#include <random>
#include "ternary.h"
using namespace ftlab;

template <class T> static bool equal(int type, int64_t n, int count, uint64_t seed, int64_t cut) {
  typedef typename T::type V;
  std::mt19937_64 r(seed);
  std::vector<V> x(n);
  for (auto& v : x) v = T::out((float)((int)(r() % 2001) - 1000)/64);
  std::vector<std::vector<uint8_t>> planes(2*count, std::vector<uint8_t>((n + 7)/8));
  ternary::Sum sum{};
  sum.count = count;
  for (auto& p : planes) for (auto& b : p) b = (uint8_t)r();
  for (int j = 0; j < count; j++) { sum.positive[j] = planes[2*j].data(); sum.negative[j] = planes[2*j + 1].data(); sum.scale[j] = (float)(r() % 1000)/7 - 50; }
  std::vector<V> want(x);
  for (int64_t i = 0; i < n; i++) {  // by the definition
    float s = 0;
    for (int j = 0; j < count; j++) s += sum.scale[j]*(float)((planes[2*j][i/8] >> i%8 & 1) - (planes[2*j + 1][i/8] >> i%8 & 1));
    want[i] = T::out(T::in(x[i]) + s);
  }
  for (int set = 0; set <= isa(); set++) {
    std::vector<V> w(x);
    int64_t all = ternary::tiles(n), strips = (n + STRIP - 1)/STRIP;
    ternary::Add add = ternary::add_of(type, set);
    add(w.data(), n, 0, cut % (all + 1), sum); add(w.data(), n, cut % (all + 1), all, sum);
    if (n && memcmp(w.data(), want.data(), n*sizeof(V))) return false;
    std::vector<uint8_t> p((n + 7)/8), m((n + 7)/8);
    ternary::Pack pack = ternary::pack_of(type, set);
    pack(x.data(), n, 0, cut % (strips + 1), p.data(), m.data()); pack(x.data(), n, cut % (strips + 1), strips, p.data(), m.data());
    for (int64_t i = 0; i < n; i++) if ((p[i/8] >> i%8 & 1) != (T::in(x[i]) > 0) || (m[i/8] >> i%8 & 1) != (T::in(x[i]) < 0)) return false;
    if (n % 8 && ((p[n/8] | m[n/8]) >> n%8)) return false;
  }
  return true;
}

int main() {
  std::mt19937_64 r(1);
  for (int i = 0; i < 1500; i++) {
    int64_t n = r() % (i % 3 ? 700 : 5000), cut = (int64_t)(r() >> 40);
    int count = (int)(i % 50 ? r() % 6 : r() % (ternary::MOST + 1)), type = i % 3;
    uint64_t seed = r();
    bool ok = type == TYPE_F32 ? equal<F32>(type, n, count, seed, cut) : type == TYPE_BF16 ? equal<BF16>(type, n, count, seed, cut)
              : equal<F16>(type, n, count, seed, cut);
    if (!ok) { printf("wrong: n %lld, %d vectors, type %d\n", (long long)n, count, type); return 1; }
  }
  puts("ok");
}
