// Rows of logits on the CPU alone, on buffers of exactly the needed size, for the address and undefined-behaviour sanitizers
#include <cstdio>
#include <random>
#include <vector>
#include "crossentropy.h"
using namespace ftlab;
using namespace ftlab::crossentropy;

// The exponential at every seventh float from -0 to -104: less than one unit in the last place off, and 0 below the smallest normal number
static bool exp_is_right() {
  for (uint32_t b = 0x80000000u; b < 0xc2d00000u; b += 7) {
    float x = number(b);
    double want = exp((double)x), got = exp_(x);
    if (x < -87.33654f ? got != 0 : std::abs(got - want) >= std::ldexp(1., std::ilogb(want) - 23)) { printf("exp(%a) is %a\n", x, got); return false; }
  }
  return exp_(0.f) == 1.f && exp_(-INFINITY) == 0.f && std::isnan(exp_(NAN));
}

static bool near(double a, double b, double slack) { return (std::isnan(a) && std::isnan(b)) || a == b || std::abs(a - b) <= slack; }

static bool same(float a, float b) { return bits(a) == bits(b) || (std::isnan(a) && std::isnan(b)); }

// Prices and gradients of some rows against plain sums in double, and the same bits for every instruction set and however the rows are parted
template <class T> static bool rows_equal(int type, int64_t rows, int64_t n, bool with_y, bool reverse, bool wild, std::mt19937_64& r) {
  typedef typename T::type V;
  std::normal_distribution<float> normal;
  std::vector<V> x(rows*n), y(with_y ? rows*n : 0), first;
  std::vector<int64_t> labels(rows);
  std::vector<float> weight(rows), out((with_y ? 7 : 4)*rows), known;
  for (auto* v : {&x, &y}) for (auto& o : *v) o = T::out(3*normal(r));
  if (wild) for (auto* v : {&x, &y}) for (auto& o : *v) if (r() % 50 == 0) o = T::out(r() % 3 ? -INFINITY : r() % 2 ? INFINITY : NAN);
  for (auto& l : labels) l = (int64_t)(r() % n);
  for (auto& w : weight) w = std::abs(normal(r));
  for (int set = 0; set <= isa(); set++) {
    std::vector<V> g = x;
    Rows k{g.data(), with_y ? y.data() : nullptr, labels.data(), out.data(), n, rows, reverse, weight.data(), .3f};
    for (int slopes = 0; slopes < 2; slopes++)
      for (int64_t a = 0; a < rows; a += 2) run_of(slopes, type, set)(k, a, a + 2 < rows ? a + 2 : rows);
    if (set == 0) { first = g; known = out; }
    for (size_t j = 0; j < g.size(); j++) if (!same(T::in(g[j]), T::in(first[j]))) { puts("gradients differ between instruction sets"); return false; }
    for (size_t j = 0; j < out.size(); j++) if (!same(out[j], known[j])) { puts("prices differ between instruction sets"); return false; }
  }
  if (wild) return true;
  double unit = type == TYPE_F32 ? 1e-6 : type == TYPE_BF16 ? 4e-3 : 5e-4;
  for (int64_t i = 0; i < rows; i++) {
    auto log_sum = [&](const std::vector<V>& v) { double s = 0; for (int64_t j = 0; j < n; j++) s += exp((double)T::in(v[i*n + j])); return log(s); };
    double lx = log_sum(x), ly = with_y ? log_sum(y) : 0, entropy = 0, kl = 0;
    for (int64_t j = 0; j < n; j++) {
      double p = T::in(x[i*n + j]) - lx, q = with_y ? T::in(y[i*n + j]) - ly : 0;
      entropy -= exp(p)*p; kl += reverse ? exp(p)*(p - q) : exp(q)*(q - p);
    }
    if (!near(out[i], lx - T::in(x[i*n + labels[i]]), 4e-6) || !near(out[rows + i], entropy, 1e-5)) { puts("a price is wrong"); return false; }
    if (with_y && !near(out[KL*rows + i], kl, 2e-5)) { puts("a distance is wrong"); return false; }
    for (int64_t j = 0; j < n; j++) {
      double p = T::in(x[i*n + j]) - lx, q = with_y ? T::in(y[i*n + j]) - ly : 0;
      double g = weight[i]*(exp(p) - (j == labels[i])) + (with_y ? .3f*(reverse ? exp(p)*(p - q - kl) : exp(p) - exp(q)) : 0);
      if (!near(T::in(first[i*n + j]), g, unit*(std::abs(g) + weight[i] + 1)*2)) { printf("a gradient is wrong: %g, not %g\n", T::in(first[i*n + j]), g); return false; }
    }
  }
  return true;
}

int main() {
  std::mt19937_64 r(1);
  if (!exp_is_right()) return 1;
  for (int i = 0; i < 400; i++) {
    int64_t rows = r() % 6, n = 1 + r() % (i % 20 ? 300 : 9000);
    bool y = r() % 2, reverse = r() % 2, wild = r() % 4 == 0;
    bool ok = i % 3 == TYPE_F32 ? rows_equal<F32>(TYPE_F32, rows, n, y, reverse, wild, r) : i % 3 == TYPE_BF16 ? rows_equal<BF16>(TYPE_BF16, rows, n, y, reverse, wild, r)
        : rows_equal<F16>(TYPE_F16, rows, n, y, reverse, wild, r);
    if (!ok) { printf("rows %lld, n %lld, type %d, y %d, reverse %d\n", (long long)rows, (long long)n, i % 3, y, reverse); return 1; }
  }
  puts("ok");
}
