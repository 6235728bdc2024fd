// Sparse AdamW on the CPU alone, on buffers of exactly the needed size, for the address and undefined-behaviour sanitizers
#include <cstdio>
#include <random>
#include <vector>
#include "layouts.h"
using namespace ftlab;
using namespace ftlab::adamw;

template <class T> static bool equal(int type, bool dense, const Layout& l, int64_t n, uint64_t seed) {
  typedef typename T::type N;
  int64_t k = (int64_t)l.places.size();
  Rates rates{.01f, 1.5f, .1f, .999f, .001f, 1e-8f, .99f};
  for (int set = 0; set <= isa(); set++) {  // every instruction set, in two parts, against one number after another
    std::mt19937 r((unsigned)seed);
    auto number_ = [&] { return std::normal_distribution<float>()(r); };
    std::vector<N> p(n), g(n);
    std::vector<float> m(k), v(k), listed(k), sum(k);
    for (auto& x : p) x = T::out(number_());
    for (auto& x : g) x = T::out(number_());
    for (auto* o : {&m, &v, &listed, &sum}) for (auto& x : *o) x = std::fabs(number_());
    auto q = p; auto a = m, b = v, out = sum;
    Job job{l.c, p.data(), dense ? (const void*)g.data() : listed.data(), m.data(), v.data(), rates};
    Job take{l.c, g.data(), nullptr, sum.data(), nullptr, rates};
    bool add = seed & 1;
    int64_t all = units(l.c), cut = seed % (all + 1);
    Loop step = step_of(type, dense, set), gather = gather_of(type, add, set);
    step(job, 0, cut); step(job, cut, all);
    gather(take, 0, cut); gather(take, cut, all);
    for (int64_t i = 0; i < k; i++) {
      int64_t at = l.places[i];
      if (!l.c.bits && place(l.c, i) != at) return false;  // what the GPU asks for
      float x = T::in(q[at]);
      update(x, dense ? T::in(g[at]) : listed[i], a[i], b[i], rates);
      q[at] = T::out(x); out[i] = add ? out[i] + T::in(g[at]) : T::in(g[at]);
    }
    if (p != q || m != a || v != b || sum != out) return false;
  }
  return true;
}

int main() {
  std::mt19937_64 r(1);
  for (int i = 0; i < 1500; i++) {
    int64_t n = r() % (i % 4 ? 900 : 14000);
    int kind = r() % 4, type = r() % 3;
    bool dense = r() % 2;
    Layout l = layout(r, n, kind);
    bool ok = type == TYPE_F32 ? equal<F32>(type, dense, l, n, r()) : type == TYPE_BF16
        ? equal<BF16>(type, dense, l, n, r()) : equal<F16>(type, dense, l, n, r());
    if (!ok) { printf("not what one number after another gives: n %lld, kind %d, type %d, dense %d\n", (long long)n, kind, type, dense); return 1; }
  }
  Table t{};
  for (int i = 0; i < ITEMS; i++) { Job j{}; j.chosen.count = i*1000; t.add(j); }
  if (t.n != ITEMS || t.first[ITEMS] != 120) { printf("the table holds %d tensors, %lld blocks\n", t.n, (long long)t.first[ITEMS]); return 1; }
  puts("ok");
}
