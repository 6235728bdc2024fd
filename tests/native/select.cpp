// Selection on the CPU alone, on buffers of exactly the needed size, for the address and undefined-behaviour sanitizers
#include <cstdio>
#include <random>
#include <vector>
#include "select.h"
using namespace ftlab;

// Selection against sorting, over blocks of exactly the needed size, in parts
template <class T> static bool select_equal(int type, int64_t n, int64_t m, uint64_t seed, bool ties) {
  std::mt19937_64 r(seed);
  std::vector<T> x(n), y(m);
  for (auto* v : {&x, &y}) for (auto& o : *v) o = ties ? (T)(r() % 5) : (T)r();
  if (n + m == 0) return true;
  int64_t k = 1 + r() % (n + m), drop = r() % (n + m - k + 1);
  for (int set = 0; set <= isa(); set++) {
    Select f = select_of(type, set);
    std::vector<Block> all{{x.data(), n}, {y.data(), m}};
    auto parts = [](int64_t size, int64_t, auto body) { for (int64_t a = 0; a < size; a += 999) body(a, std::min(size, a + 999), [](auto add) { add(); }); };
    Found low = find(all, f, drop + k - 1, parts), high{0x7fffffffu, 0};
    if (drop) high = find(all, f, drop - 1, parts);
    Cut c{low.key, high.key, drop + k - low.above, drop - high.above};
    std::vector<uint32_t> sorted;
    for (int64_t i = 0; i < n + m; i++) sorted.push_back(f.key(i < n ? all[0].x : all[1].x, i < n ? i : i - n));
    std::sort(sorted.rbegin(), sorted.rend());
    if (low.key != sorted[drop + k - 1] || (drop && high.key != sorted[drop - 1])) return false;
    Count seen = f.count(x.data(), 0, n, c);
    std::vector<uint8_t> a((n + 7)/8), b((m + 7)/8);
    f.mask(x.data(), 0, n, c, {0, 0}, a.data());
    f.mask(y.data(), 0, m, c, {seen.low, seen.high}, b.data());
    int64_t first = 0, total = 0;
    for (auto o : a) first += __builtin_popcount(o);
    for (auto o : b) total += __builtin_popcount(o);
    if ((total += first) != k) return false;
    std::vector<int32_t> i(first), j(k - first);
    f.indices(x.data(), 0, n, c, {0, 0}, i.data());
    f.indices(y.data(), 0, m, c, {seen.low, seen.high}, j.data());
    for (auto o : i) if (!(a[o >> 3] >> (o & 7) & 1)) return false;
    for (auto o : j) if (!(b[o >> 3] >> (o & 7) & 1)) return false;
  }
  return true;
}

int main() {
  std::mt19937_64 r(1);
  for (int i = 0; i < 600; i++) {
    int64_t n = r() % 3000, m = r() % 300;
    int type = i % 3;
    if (i % 97 == 0) n = 600000 + r() % 1000;  // large enough for a guess
    bool ties = r() % 2, ok = type == TYPE_F32 ? select_equal<uint32_t>(type, n, m, r(), ties) : select_equal<uint16_t>(type, n, m, r(), ties);
    if (!ok) { printf("selection is wrong: n %lld, m %lld, type %d\n", (long long)n, (long long)m, type); return 1; }
  }
  puts("ok");
}
