// W <- W + sum of s_j*T_j, where each T_j holds -1, 0 and 1 as two planes of bits: bit j of byte b stands for number 8b + j, as in a mask.
// The sum is made in float32, from 0, in the order given; then one addition to W, rounded once to W's type.
#pragma once
#include "common.h"
#ifndef __CUDACC__
#include "select.h"  // bits_of
#endif

namespace ftlab::ternary {

constexpr int MOST = 128;  // vectors in one pass, so that a GPU gets them all as one argument
struct Sum { int64_t count; const uint8_t *positive[MOST], *negative[MOST]; float scale[MOST]; };

// s, -s or 0, the number's bits being the highest ones. No product is needed, so none is rounded. Were both bits set, s and -s would leave
// -0, which changes no sum that began with 0.
FTLAB_HD float term(uint32_t positive, uint32_t negative, float s) {
  uint32_t p = (uint32_t)((int32_t)positive >> 31), n = (uint32_t)((int32_t)negative >> 31);
  return number((p & bits(s)) ^ (n & bits(-s)));
}

// Above and below 0, by the bits alone: NaN is neither
template <class T> struct Infinity;
template <> struct Infinity<F32> { static constexpr uint32_t BITS = 0x7f800000u; };
template <> struct Infinity<BF16> { static constexpr uint32_t BITS = 0x7f80u; };
template <> struct Infinity<F16> { static constexpr uint32_t BITS = 0x7c00u; };
FTLAB_HD uint32_t raw(float v) { return bits(v); }
FTLAB_HD uint32_t raw(uint16_t v) { return v; }
template <class T> FTLAB_HD bool above(typename T::type v) { return raw(v) - 1u < Infinity<T>::BITS; }
template <class T> FTLAB_HD bool below(typename T::type v) { return raw(v) - (sizeof(v) == 4 ? 0x80000001u : 0x8001u) < Infinity<T>::BITS; }

#ifndef __CUDACC__
constexpr int WORD = 32, WORDS = 8, TILE = WORD*WORDS;  // a tile: 32 bytes of each plane
inline int64_t tiles(int64_t n) { return n/TILE + (n % TILE != 0); }

FTLAB_HD uint32_t word(const uint8_t* plane, int w) { uint32_t b; memcpy(&b, plane + 4*w, 4); return b; }

// What the vectors add to a tile's numbers, whose bits begin at the given byte
typedef void (*Total)(const Sum&, int64_t byte, float* sum);
inline void total_plain(const Sum& v, int64_t byte, float* sum) {
  for (int i = 0; i < TILE; i++) sum[i] = 0;
  for (int64_t j = 0; j < v.count; j++) for (int w = 0; w < WORDS; w++) {
    uint32_t p = word(v.positive[j] + byte, w), n = word(v.negative[j] + byte, w);
    for (int i = 0; i < WORD; i++) sum[w*WORD + i] += term(p << (WORD - 1 - i), n << (WORD - 1 - i), v.scale[j]);
  }
}
#if FTLAB_X86
// Eight numbers at a time. First a number's two bits are laid side by side: four bits of a plane are spread to eight by a table of 16,
// which the processor can look up for 32 bytes at once. Then two bits choose among four: 0, s, -s, and 0 for what would be both.
FTLAB_AVX2 inline void pairs_avx2(const uint8_t* positive, const uint8_t* negative, uint32_t* to) {
  const __m256i apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 16, 17, 20, 21, 64, 65, 68, 69, 80, 81, 84, 85)), four = _mm256_set1_epi8(15);
  __m256i p = _mm256_loadu_si256((const __m256i*)positive), n = _mm256_loadu_si256((const __m256i*)negative), twice = _mm256_add_epi8(apart, apart);
  __m256i low = _mm256_or_si256(_mm256_shuffle_epi8(apart, _mm256_and_si256(p, four)), _mm256_shuffle_epi8(twice, _mm256_and_si256(n, four)));
  __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(apart, _mm256_and_si256(_mm256_srli_epi16(p, 4), four)),
                                 _mm256_shuffle_epi8(twice, _mm256_and_si256(_mm256_srli_epi16(n, 4), four)));
  __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
  _mm256_store_si256((__m256i*)to, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_store_si256((__m256i*)(to + WORDS), _mm256_permute2x128_si256(even, odd, 0x31));
}
FTLAB_AVX2 __attribute__((noinline)) inline void total_avx2(const Sum& v, int64_t byte, float* sum) {
  const __m256i by = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  alignas(32) uint32_t pairs[MOST][2*WORDS];
  alignas(16) float of[MOST][4];
  int64_t count = v.count;
  for (int64_t j = 0; j < count; j++) {
    pairs_avx2(v.positive[j] + byte, v.negative[j] + byte, pairs[j]);
    of[j][0] = of[j][3] = 0; of[j][1] = v.scale[j]; of[j][2] = -v.scale[j];
  }
  for (int w = 0; w < 2*WORDS; w += 2) {
    __m256 s[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t j = 0; j < count; j++) {
      __m256 four = _mm256_broadcast_ps((const __m128*)of[j]);
      for (int g = 0; g < 4; g += 2) {
        __m256i two = _mm256_srlv_epi32(_mm256_set1_epi32((int)pairs[j][w + g/2]), by);
        s[g] = _mm256_add_ps(s[g], _mm256_permutevar_ps(four, two));
        s[g + 1] = _mm256_add_ps(s[g + 1], _mm256_permutevar_ps(four, _mm256_srli_epi32(two, 16)));
      }
    }
    for (int g = 0; g < 4; g++) _mm256_store_ps(sum + w*WORD/2 + 8*g, s[g]);
  }
}
// Sixteen at a time: the bits are a mask as they are
FTLAB_AVX512 __attribute__((noinline)) inline void total_avx512(const Sum& v, int64_t byte, float* sum) {
  for (int w = 0; w < WORDS; w++) {
    __m512 s = _mm512_setzero_ps(), t = s;
    for (int64_t j = 0; j < v.count; j++) {
      uint32_t p = word(v.positive[j] + byte, w), n = word(v.negative[j] + byte, w), both = p & n;
      __m512 more = _mm512_set1_ps(v.scale[j]);
      p ^= both; n ^= both;
      s = _mm512_mask_add_ps(s, (__mmask16)p, s, more); t = _mm512_mask_add_ps(t, (__mmask16)(p >> 16), t, more);
      s = _mm512_mask_sub_ps(s, (__mmask16)n, s, more); t = _mm512_mask_sub_ps(t, (__mmask16)(n >> 16), t, more);
    }
    _mm512_store_ps(sum + w*WORD, s); _mm512_store_ps(sum + w*WORD + 16, t);
  }
}
#else
constexpr Total total_avx2 = total_plain, total_avx512 = total_plain;
#endif

template <class T> FTLAB_HD void add(typename T::type* w, const float* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) w[i] = T::out(T::in(w[i]) + sum[i]);
}

// The last tile may be short: its bits go into planes of full length first
template <class T, Total total> __attribute__((noinline)) void add_last(typename T::type* w, int64_t n, int64_t byte, const Sum& v) {
  alignas(64) float sum[TILE];
  uint8_t rest[2*MOST][TILE/8] = {};
  Sum full{};
  full.count = v.count;
  for (int64_t j = 0; j < v.count; j++) {
    full.positive[j] = rest[2*j]; full.negative[j] = rest[2*j + 1]; full.scale[j] = v.scale[j];
    memcpy(rest[2*j], v.positive[j] + byte, (size_t)(n + 7)/8); memcpy(rest[2*j + 1], v.negative[j] + byte, (size_t)(n + 7)/8);
  }
  total(full, 0, sum); add<T>(w, sum, n);
}

// Tiles begin to end of one tensor of n numbers; the sums never leave the nearest cache
template <class T, Total total> FTLAB_HD void add_range(void* tensor, int64_t n, int64_t begin, int64_t end, const Sum& v) {
  auto* w = (typename T::type*)tensor;
  alignas(64) float sum[TILE];
  for (int64_t tile = begin; tile < end; tile++) {
    int64_t at = tile*TILE, left = n - at;
    if (left < TILE) add_last<T, total>(w + at, left, at/8, v);
    else { total(v, at/8, sum); add<T>(w + at, sum, TILE); }  // a length known in advance: no remainder loop
  }
}

// The planes of what is above and below 0, 64 numbers at a time, for strips begin to end
template <class T> FTLAB_HD void pack_range(const void* tensor, int64_t n, int64_t begin, int64_t end, uint8_t* positive, uint8_t* negative) {
  auto* x = (const typename T::type*)tensor;
  alignas(64) uint8_t p[STRIP], m[STRIP];
  for (int64_t strip = begin; strip < end; strip++) {
    int64_t at = strip*STRIP, left = n - at;
    if (left >= STRIP) {
#pragma omp simd
      for (int i = 0; i < STRIP; i++) { p[i] = above<T>(x[at + i]); m[i] = below<T>(x[at + i]); }
    } else for (int i = 0; i < STRIP; i++) { p[i] = i < left && above<T>(x[at + i]); m[i] = i < left && below<T>(x[at + i]); }
    uint64_t a = bits_of(p), b = bits_of(m);
    size_t bytes = left < STRIP ? (size_t)(left + 7)/8 : STRIP/8;
    memcpy(positive + at/8, &a, bytes); memcpy(negative + at/8, &b, bytes);
  }
}

typedef void (*Add)(void*, int64_t, int64_t, int64_t, const Sum&);
typedef void (*Pack)(const void*, int64_t, int64_t, int64_t, uint8_t*, uint8_t*);
#define FTLAB_TERNARY(ISA, TARGET) \
  template <class T> TARGET void add_##ISA(void* w, int64_t n, int64_t a, int64_t b, const Sum& v) { add_range<T, total_##ISA>(w, n, a, b, v); } \
  template <class T> TARGET void pack_##ISA(const void* x, int64_t n, int64_t a, int64_t b, uint8_t* p, uint8_t* m) { pack_range<T>(x, n, a, b, p, m); } \
  static const Add ISA##_adds[3] = {add_##ISA<F32>, add_##ISA<BF16>, add_##ISA<F16>}; \
  static const Pack ISA##_packs[3] = {pack_##ISA<F32>, pack_##ISA<BF16>, pack_##ISA<F16>};
FTLAB_TERNARY(plain, )
FTLAB_TERNARY(avx2, FTLAB_AVX2)
FTLAB_TERNARY(avx512, FTLAB_AVX512)

inline Add add_of(int type, int set) { return (set == 2 ? avx512_adds : set == 1 ? avx2_adds : plain_adds)[type]; }
inline Pack pack_of(int type, int set) { return (set == 2 ? avx512_packs : set == 1 ? avx2_packs : plain_packs)[type]; }
#endif

}  // namespace ftlab::ternary
