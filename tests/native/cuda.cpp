// The CUDA kernels on a processor (cuda_shim.h) against the C++ that the CPU runs, bit for bit, on buffers of exactly the needed size
#include <cstring>
#include "cuda_shim.h"
#define FTLAB_GRID 3  // so few that a block takes several turns
#include "crossentropy.h"
#include "cuda.h"
#include "layouts.h"
#include "perturb.h"
#include "select.h"
#include "ternary.h"
namespace gpu_adamw {
#include "adamw.cu"
}
namespace gpu_crossentropy {
#include "crossentropy.cu"
}
namespace gpu_perturb {
#include "perturb.cu"
}
namespace gpu_select {
#include "select.cu"
}
namespace gpu_ternary {
#include "ternary.cu"
}
using namespace ftlab;

static std::mt19937_64 r(1);
static int64_t up_to(int64_t n) { return (int64_t)(r() % (uint64_t)(n + 1)); }

template <class V> static std::vector<V> some(int64_t n) {  // any bits at all, and often the same ones
  std::vector<V> x(n);
  int kind = (int)(r() % 3);
  for (auto& v : x) v = kind == 0 ? (V)r() : kind == 1 ? (V)(r() % 5) : (V)(bits((float)(r() % 64) - 31) >> (sizeof(V) == 4 ? 0 : 16));
  return x;
}
static bool same(const void* a, const void* b, size_t n) { return n == 0 || memcmp(a, b, n) == 0; }

template <class V> static bool perturb_equal(int type) {
  int64_t n = up_to(9000);
  int signs = (int)(r() % 2);
  bool low = type == TYPE_BF16 && r() % 2;
  Move m{r(), r() % 7, .01f, .999f};
  std::vector<V> p(n);
  for (auto& v : p) v = sizeof(V) == 4 ? (V)bits((float)up_to(999)/77) : (V)(bits((float)up_to(999)/77) >> 16);
  std::vector<int16_t> rest(low ? n : 0);
  std::vector<V> q(p);
  std::vector<int16_t> left(rest);
  range_of(signs, type, 0)(p.data(), low ? rest.data() : nullptr, n, 0, tiles(n, signs), m);
  if (gpu_perturb::ftlab_perturb(q.data(), low ? left.data() : nullptr, n, signs, type, m.seed, m.tensor, m.scale, m.decay, nullptr)) return false;
  return same(p.data(), q.data(), n*sizeof(V)) && rest == left;
}

template <class V> static bool ternary_equal(int type) {
  int64_t n = up_to(5000), shift = (int64_t)(r() % 3);  // a tensor may begin anywhere
  int count = (int)(r() % 20 ? r() % 5 : r() % (ternary::MOST + 1));
  std::vector<std::vector<uint8_t>> planes(2*count, std::vector<uint8_t>((n + 7)/8));
  ternary::Sum sum{};
  sum.count = count;
  for (auto& p : planes) for (auto& b : p) b = (uint8_t)r();
  for (int j = 0; j < count; j++) { sum.positive[j] = planes[2*j].data(); sum.negative[j] = planes[2*j + 1].data(); sum.scale[j] = (float)up_to(1000)/7 - 50; }
  std::vector<V> w(n + shift);
  for (auto& v : w) v = (V)((float)(r() % 2000)/8 - 125);  // float: a number; uint16_t: bits, of any kind
  std::vector<V> q(w);
  ternary::add_of(type, 0)(w.data() + shift, n, 0, ternary::tiles(n), sum);
  if (gpu_ternary::ftlab_add_ternary(q.data() + shift, n, type, &sum, nullptr) || !same(w.data(), q.data(), w.size()*sizeof(V))) return false;
  std::vector<uint8_t> a((n + 7)/8), b(a), c(a), d(a);
  ternary::pack_of(type, 0)(w.data() + shift, n, 0, (n + STRIP - 1)/STRIP, a.data(), b.data());
  return gpu_ternary::ftlab_pack_signs(w.data() + shift, n, type, c.data(), d.data(), nullptr) == 0 && a == c && b == d;
}

// Many tensors, some of them empty, in several batches where there are enough; small parts, so that most tensors have some
template <class V> static bool select_equal(int type, bool many) {
  int tensors = many ? MANY + 1 + (int)(r() % 9) : 1 + (int)(r() % 4);
  std::vector<std::vector<V>> x;
  std::vector<Block> all;
  int64_t total = 0;
  for (int j = 0; j < tensors; j++) { x.push_back(some<V>(r() % 4 ? up_to(many ? 40 : 6000) : 0)); total += (int64_t)x[j].size(); }
  for (auto& t : x) all.push_back({t.data(), (int64_t)t.size()});
  if (total == 0) return true;
  int64_t k = 1 + up_to(total - 1), drop = r() % 2 ? up_to(total - k) : 0;
  Select f = select_of(type, 0);
  auto whole = [](int64_t n, int64_t, auto body) { body(0, n, [](auto add) { add(); }); };
  Found low = find(all, f, drop + k - 1, whole), high{0x7fffffffu, 0};
  if (drop) high = find(all, f, drop - 1, whole);
  int64_t want[4] = {low.key, high.key, drop + k - low.above, drop - high.above}, found[4];
  auto parts_all = cut_up(all, 2048 << r() % 3);
  int batches = (int)parts_all.size();
  std::vector<uint64_t> work(gpu_select::ftlab_kth_work()/8, r());
  if (gpu_select::ftlab_kth_find(parts_all.data(), batches, type, drop + k - 1, drop - 1, work.data(), found, nullptr) || !same(want, found, 32)) return false;

  Cut c{low.key, high.key, want[2], want[3]};
  std::vector<Count> counts(parts(parts_all) + 1, Count{-1, -1, -1});
  std::vector<int64_t> chosen(tensors), room(tensors);
  if (gpu_select::ftlab_kth_count(parts_all.data(), batches, type, found, counts.data(), chosen.data(), nullptr)) return false;
  std::vector<std::vector<uint8_t>> masks, our_masks;
  std::vector<std::vector<int32_t>> places, our_places;
  std::vector<void*> to;
  Count before{0, 0, 0};
  for (int j = 0; j < tensors; j++) {
    Count n = f.count(x[j].data(), 0, all[j].n, c), after{before.between + n.between, before.low + n.low, before.high + n.high};
    int64_t size = chosen_before(after, c) - chosen_before(before, c);
    if (size != chosen[j]) return false;
    masks.emplace_back((all[j].n + 7)/8); our_masks.emplace_back((all[j].n + 7)/8, (uint8_t)0xaa); places.emplace_back(size); our_places.emplace_back(size, -1);
    f.mask(x[j].data(), 0, all[j].n, c, {before.low, before.high}, masks[j].data());
    f.indices(x[j].data(), 0, all[j].n, c, {before.low, before.high}, places[j].data());
    before = after;
  }
  for (int way = many ? 2 : 0; way < 3; way++) {  // masks, indices, and some of each
    to.clear();
    for (int j = 0; j < tensors; j++) {
      bool bits = way == 0 || (way == 2 && j % 2);
      room[j] = bits ? -1 : (int64_t)our_places[j].size();
      to.push_back(bits ? (void*)our_masks[j].data() : (void*)our_places[j].data());
      std::fill(our_places[j].begin(), our_places[j].end(), -1);
    }
    if (gpu_select::ftlab_kth_write(parts_all.data(), batches, type, found, counts.data(), to.data(), room.data(), nullptr)) return false;
    for (int j = 0; j < tensors; j++) if (room[j] < 0 ? our_masks[j] != masks[j] : our_places[j] != places[j]) return false;
  }
  for (int j = 0; j < tensors; j++) if (!many && our_places[j].size() > 1) {  // less room than is needed: filled, and no further
    std::vector<int32_t> half(our_places[j].size()/2, -1);
    for (int i = 0; i < tensors; i++) { room[i] = i == j ? (int64_t)half.size() : 0; to[i] = i == j ? half.data() : nullptr; }
    return gpu_select::ftlab_kth_write(parts_all.data(), batches, type, found, counts.data(), to.data(), room.data(), nullptr) == 0 &&
        same(half.data(), places[j].data(), half.size()*4);
  }
  return true;
}

// More parts than a block has threads
static bool before_equal() {
  int64_t parts = up_to(800);
  std::vector<Count> n(parts + 1), want;
  Count sum{0, 0, 0};
  for (auto& c : n) { c = {up_to(9), up_to(9), up_to(9)}; want.push_back(sum); sum += c; }
  Count* to = n.data();
  FTLAB_LAUNCH(gpu_select::before, 1, gpu_select::THREADS, nullptr, to, parts);
  return same(n.data(), want.data(), n.size()*sizeof(Count));
}

// Several tensors a launch, of every layout, some of them empty; often more than a launch takes
template <class T> static bool adamw_equal(int type, bool many) {
  typedef typename T::type N;
  struct Mine { std::vector<N> p, g; std::vector<float> m, v, listed; };
  std::mt19937 normals((unsigned)r());
  auto normal = [&] { return std::normal_distribution<float>()(normals); };
  int tensors = many ? adamw::ITEMS + 1 + (int)(r() % 40) : 1 + (int)(r() % 4), what = (int)(r() % 4);
  std::vector<adamw::Layout> layouts;
  std::vector<Mine> want, got;
  for (int j = 0; j < tensors; j++) {
    int64_t n = r() % 6 ? up_to(many ? 300 : 10000) : 0;
    layouts.push_back(adamw::layout(r, n, (int)(r() % 4)));
    size_t k = layouts[j].places.size();
    Mine t{std::vector<N>(n), std::vector<N>(n), std::vector<float>(k), std::vector<float>(k), std::vector<float>(k)};
    for (auto* o : {&t.p, &t.g}) for (auto& x : *o) x = T::out(normal());
    for (auto* o : {&t.m, &t.listed}) for (auto& x : *o) x = normal();
    for (auto& x : t.v) x = std::fabs(normal());
    want.push_back(t); got.push_back(t);
  }
  auto job = [&](Mine& t, int j) {
    adamw::Rates rates{.01f*(float)(j + 1), 1.5f, .1f, .999f, .001f, 1e-8f, .99f};
    if (what == adamw::LIST || what == adamw::ADD) return adamw::Job{layouts[j].c, t.g.data(), nullptr, t.m.data(), nullptr, rates};
    return adamw::Job{layouts[j].c, t.p.data(), what == adamw::DENSE ? (const void*)t.g.data() : t.listed.data(), t.m.data(), t.v.data(), rates};
  };
  bool gather = what == adamw::LIST || what == adamw::ADD;
  adamw::Loop loop = gather ? adamw::plain_gathers[what == adamw::ADD][type] : adamw::plain_steps[what == adamw::DENSE][type];
  adamw::Table table{};
  for (int j = 0; j < tensors; j++) {
    loop(job(want[j], j), 0, adamw::units(layouts[j].c));
    table.add(job(got[j], j));
    if (table.n < adamw::ITEMS && j + 1 < tensors) continue;
    if (table.first[table.n] && gpu_adamw::ftlab_adamw(&table, type, what, nullptr)) return false;  // a grid of no blocks is an error
    table = adamw::Table{};
  }
  for (int j = 0; j < tensors; j++) if (want[j].p != got[j].p || want[j].g != got[j].g || want[j].m != got[j].m || want[j].v != got[j].v) return false;
  return true;
}

static bool alike(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }
// A float32 of many added is off by its last places, here and there by others. 2^-20 is 16 times what one addition may be off
static bool near(float a, float b, float size) { return alike(a, b) || std::fabs(a - b) <= std::ldexp(size, -20); }

// Prices: the CPU's bits where each sum is exact, else near them, as the GPU adds in another order. Gradients: the bits, from the same prices
template <class T> static bool rows_equal(int type) {
  typedef typename T::type N;
  int64_t rows = (int64_t)(r() % 9), n = 1 + up_to(r() % 4 ? r() % 3 ? 600 : 3 : 5000), seven = r() % 3 ? 7 : 4;
  bool with_y = seven == 7, reverse = r() % 2, wild = false, exact = r() % 3 == 0;
  if (!exact) wild = r() % 2;
  std::mt19937 normals((unsigned)r());
  std::normal_distribution<float> normal;
  std::vector<N> x(rows*n), y(with_y ? rows*n : 0);
  std::vector<int64_t> labels(rows);
  std::vector<float> weight(rows), out(seven*rows, 7), ours(out);
  for (auto* v : {&x, &y}) for (auto& o : *v)
    o = T::out(exact ? r() % 2 ? 0 : r() % 2 ? -100 : -INFINITY : wild && r() % 9 == 0 ? r() % 99 ? -INFINITY : r() % 2 ? INFINITY : NAN : 3*normal(normals));
  for (auto& l : labels) l = up_to(n - 1);
  for (auto& w : weight) w = normal(normals);
  std::vector<N> z(x);
  crossentropy::Rows k{x.data(), with_y ? y.data() : nullptr, labels.data(), out.data(), n, rows, reverse, weight.data(), .3f}, g(k);
  g.x = z.data(); g.out = ours.data();
  crossentropy::plain_runs[0][type](k, 0, rows);
  if (gpu_crossentropy::ftlab_row_stats(&g, type, nullptr) || !same(x.data(), z.data(), x.size()*sizeof(N))) return false;
  for (int64_t i = 0; i < seven*rows; i++) {
    int64_t what = i/rows;
    bool sum = what == crossentropy::SUM || what == crossentropy::OTHER_SUM, top = what == crossentropy::TOP || what == crossentropy::OTHER_TOP;
    float v = std::fabs(out[i]), size = sum ? v : what == crossentropy::KL ? v + 10 : v + 1;  // where numbers are taken from each other, theirs
    if (exact || top ? !alike(out[i], ours[i]) : !near(out[i], ours[i], size)) { printf("price %d: %a, not %a\n", (int)what, ours[i], out[i]); return false; }
  }
  g.out = out.data();
  crossentropy::plain_runs[1][type](k, 0, rows);
  if (gpu_crossentropy::ftlab_row_gradient(&g, type, nullptr)) return false;
  for (int64_t i = 0; i < rows*n; i++) if (x[i] != z[i] && !(std::isnan(T::in(x[i])) && std::isnan(T::in(z[i])))) return false;
  return true;
}

int main(int, char** a) {
  int rounds = a[1] ? atoi(a[1]) : 2;
  for (int i = 0; i < 3*rounds; i++) {
    int type = i % 3;
    bool wide = type == TYPE_F32;
    const char* differs = nullptr;
    if (wide ? !perturb_equal<uint32_t>(type) : !perturb_equal<uint16_t>(type)) differs = "noise";
    else if (wide ? !ternary_equal<float>(type) : !ternary_equal<uint16_t>(type)) differs = "packed vectors";
    else if (wide ? !select_equal<uint32_t>(type, i % 7 == 2) : !select_equal<uint16_t>(type, i % 7 == 2)) differs = "selection";
    else if (type == TYPE_F32 ? !adamw_equal<F32>(type, i % 5 == 0) : type == TYPE_BF16 ? !adamw_equal<BF16>(type, i % 5 == 0) : !adamw_equal<F16>(type, i % 5 == 0))
      differs = "the optimizer";
    else if (type == TYPE_F32 ? !rows_equal<F32>(type) : type == TYPE_BF16 ? !rows_equal<BF16>(type) : !rows_equal<F16>(type)) differs = "rows of logits";
    else if (!before_equal()) differs = "the sums over parts";
    if (differs) { printf("differs: %s, type %d, round %d\n", differs, type, i); return 1; }
  }
  puts("ok");
}
