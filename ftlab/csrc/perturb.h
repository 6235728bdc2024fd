// p <- (p + scale*z) * decay, in place, on the CPU. Nothing here knows torch, so that sanitizers can run it alone.
#pragma once
#include "philox.h"

namespace ftlab {

struct Move { uint64_t seed, tensor; float scale, decay; };

// A tile's random words, lane beside lane
typedef void (*Words)(const Move&, uint64_t tile, uint32_t (*x)[LANES]);
inline void words_plain(const Move& m, uint64_t tile, uint32_t (*x)[LANES]) {
  for (int i = 0; i < LANES; i++) philox(m.seed, m.tensor, tile*LANES + i, x[0][i], x[1][i], x[2][i], x[3][i]);
}
// The same by vectors of 64-bit lanes. The instruction that multiplies two 32-bit numbers to 64 bits ignores the upper halves of its
// inputs, so each product serves as it comes: shifted down, its upper half; as it is, its lower. Compilers do not see this, and shuffle.
#define FTLAB_WORDS(NAME, TARGET, BYTES, MUL, VEC) \
  TARGET __attribute__((noinline)) inline void NAME(const Move& m, uint64_t tile, uint32_t (*x)[LANES]) { \
    typedef uint64_t V __attribute__((vector_size(BYTES))); \
    typedef uint32_t H __attribute__((vector_size(BYTES/2))); \
    constexpr int N = BYTES/8; \
    const V A = V{} + 0xD2511F53u, C = V{} + 0xCD9E8D57u; \
    V next; \
    for (int j = 0; j < N; j++) next[j] = tile*LANES + j; \
    V key0[10], key1[10]; \
    for (int r = 0; r < 10; r++) { key0[r] = V{} + (uint32_t)(m.seed + r*0x9E3779B9u); key1[r] = V{} + (uint32_t)((m.seed >> 32) + r*0xBB67AE85u); } \
    for (int i = 0; i < LANES; i += 2*N, next += 2*N) { /* two vectors at once: one round waits for its product, the other works */ \
      V a = next, b = next >> 32, c = V{} + m.tensor, d = V{} + (m.tensor >> 32), e = next + N, f = e >> 32, g = c, h = d; \
      for (int r = 0; r < 10; r++) { \
        V p = (V)MUL((VEC)a, (VEC)A), q = (V)MUL((VEC)c, (VEC)C), s = (V)MUL((VEC)e, (VEC)A), t = (V)MUL((VEC)g, (VEC)C); \
        a = (q >> 32) ^ b ^ key0[r]; b = q; c = (p >> 32) ^ d ^ key1[r]; d = p; \
        e = (t >> 32) ^ f ^ key0[r]; f = t; g = (s >> 32) ^ h ^ key1[r]; h = s; \
      } \
      V all[8] = {a, b, c, d, e, f, g, h}; \
      for (int j = 0; j < 8; j++) { H w = __builtin_convertvector(all[j], H); memcpy(x[j & 3] + i + (j >> 2)*N, &w, sizeof w); } \
    } \
  }
#if FTLAB_X86
FTLAB_WORDS(words_avx2, FTLAB_AVX2, 32, _mm256_mul_epu32, __m256i)
FTLAB_WORDS(words_avx512, FTLAB_AVX512, 64, _mm512_mul_epu32, __m512i)
#else
constexpr Words words_avx2 = words_plain, words_avx512 = words_plain;
#endif

// A tile of normal numbers
template <Words words> FTLAB_HD void normal_tile(const Move& m, uint64_t tile, float* z) {
  alignas(64) uint32_t x[4][LANES];
  words(m, tile, x);
#pragma omp simd
  for (int i = 0; i < LANES; i++) {
    normals(x[0][i], x[1][i], z[i], z[LANES + i]);
    normals(x[2][i], x[3][i], z[2*LANES + i], z[3*LANES + i]);
  }
}

// Bit k of word w of lane i is the sign of number (4k + w)*LANES + i of the tile
FTLAB_HD float sign(uint32_t word, int k) { return number(0x3f800000u | ((word >> k) << 31)); }

template <class T> FTLAB_HD void add(typename T::type* p, const float* z, int64_t n, const Move& m) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) p[i] = T::out((T::in(p[i]) + m.scale*z[i])*m.decay);
}

FTLAB_HD void add_split(uint16_t* p, int16_t* low, const float* z, int64_t n, const Move& m) {
  for (int64_t i = 0; i < n; i++) split((join(p[i], low[i]) + m.scale*z[i])*m.decay, p[i], low[i]);
}

// Tiles begin to end of one tensor of n numbers; z lives in registers and the first-level cache only
template <class T, Words words> FTLAB_HD void normal_range(typename T::type* p, int16_t* low, int64_t n, int64_t begin, int64_t end, const Move& m) {
  alignas(64) float z[NORMALS];
  for (int64_t t = begin; t < end; t++) {
    int64_t at = t*NORMALS, left = n - at;
    normal_tile<words>(m, (uint64_t)t, z);
    if (low) add_split((uint16_t*)p + at, low + at, z, left < NORMALS ? left : NORMALS, m);
    else if (left < NORMALS) add<T>(p + at, z, left, m);
    else add<T>(p + at, z, NORMALS, m);  // a length known in advance: no remainder loop
  }
}
template <class T, Words words> FTLAB_HD void sign_range(typename T::type* p, int16_t* low, int64_t n, int64_t begin, int64_t end, const Move& m) {
  alignas(64) uint32_t x[4][LANES];
  for (int64_t t = begin; t < end; t++) {
    words(m, (uint64_t)t, x);
    for (int row = 0; row < 128; row++) {
      int64_t at = t*SIGNS + row*LANES, left = n - at;
      if (left <= 0) break;
      alignas(64) float z[LANES];
#pragma omp simd
      for (int i = 0; i < LANES; i++) z[i] = sign(x[row & 3][i], row >> 2);
      if (low) add_split((uint16_t*)p + at, low + at, z, left < LANES ? left : LANES, m);
      else if (left < LANES) add<T>(p + at, z, left, m);
      else add<T>(p + at, z, LANES, m);
    }
  }
}

enum Kind { NORMAL = 0, RADEMACHER = 1 };
inline int64_t tiles(int64_t n, int kind) { int64_t size = kind == NORMAL ? NORMALS : SIGNS; return n/size + (n % size != 0); }

typedef void (*Range)(void*, int16_t*, int64_t, int64_t, int64_t, const Move&);
#define FTLAB_RANGE(NAME, TARGET, RANGE, T, ISA) \
  TARGET inline void NAME(void* p, int16_t* low, int64_t n, int64_t begin, int64_t end, const Move& m) { \
    RANGE<T, words_##ISA>((typename T::type*)p, low, n, begin, end, m); }
#define FTLAB_RANGES(ISA, TARGET) \
  FTLAB_RANGE(normal_f32_##ISA, TARGET, normal_range, F32, ISA) FTLAB_RANGE(sign_f32_##ISA, TARGET, sign_range, F32, ISA) \
  FTLAB_RANGE(normal_bf16_##ISA, TARGET, normal_range, BF16, ISA) FTLAB_RANGE(sign_bf16_##ISA, TARGET, sign_range, BF16, ISA) \
  FTLAB_RANGE(normal_f16_##ISA, TARGET, normal_range, F16, ISA) FTLAB_RANGE(sign_f16_##ISA, TARGET, sign_range, F16, ISA) \
  static const Range ISA##_ranges[2][3] = {{normal_f32_##ISA, normal_bf16_##ISA, normal_f16_##ISA}, {sign_f32_##ISA, sign_bf16_##ISA, sign_f16_##ISA}};
FTLAB_RANGES(plain, )
FTLAB_RANGES(avx2, FTLAB_AVX2)
FTLAB_RANGES(avx512, FTLAB_AVX512)

inline Range range_of(int kind, int type, int set) { return (set == 2 ? avx512_ranges : set == 1 ? avx2_ranges : plain_ranges)[kind][type]; }

}  // namespace ftlab
