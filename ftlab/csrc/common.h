// What all kernels share, host and device: formats of half width, and on the host the choice of instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
#define FTLAB_HD __host__ __device__ __forceinline__
#else
#define FTLAB_HD inline __attribute__((always_inline))
#endif

// Each loop is compiled for three instruction sets, and the processor chooses when the program runs: one build, portable and fast
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#define FTLAB_X86 1
#define FTLAB_AVX2 __attribute__((target("avx2")))
#define FTLAB_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw")))
#else
#define FTLAB_X86 0
#define FTLAB_AVX2
#define FTLAB_AVX512
#endif

namespace ftlab {

FTLAB_HD uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
FTLAB_HD float number(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

// Half-width formats, as bits: to float exactly, and back to the nearest (ties to even), NaN kept
struct F32 { typedef float type; static FTLAB_HD float in(float v) { return v; } static FTLAB_HD float out(float v) { return v; } };
struct BF16 {
  typedef uint16_t type;
  static FTLAB_HD float in(uint16_t v) { return number((uint32_t)v << 16); }
  static FTLAB_HD uint16_t out(float v) {
    uint32_t b = bits(v), nan = (b & 0x7fffffffu) > 0x7f800000u;
    return (uint16_t)(nan ? 0x7fc0u : (b + 0x7fffu + ((b >> 16) & 1)) >> 16);
  }
};
struct F16 {
  typedef uint16_t type;
  static FTLAB_HD float in(uint16_t v) {
    uint32_t w = (uint32_t)v << 16, sign = w & 0x80000000u, two = w + w;   // two: the sign shifted out
    float normal = number((two >> 4) + (0xE0u << 23))*1.925929944387236e-34f;  // 2^-112: re-biases the exponent, and keeps inf and NaN
    float tiny = number((two >> 17) | (126u << 23)) - 0.5f;
    return number(sign | bits(two < (1u << 27) ? tiny : normal));
  }
  static FTLAB_HD uint16_t out(float v) {
    uint32_t b = bits(v), two = b + b, sign = (b >> 16) & 0x8000u, bias = two & 0xFF000000u;
    float base = (number(b & 0x7fffffffu)*5.192296858534828e+33f)*7.703719777548943e-34f;  // 2^112, 2^-110: what is too large becomes inf
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    uint32_t r = bits(number((bias >> 1) + 0x07800000u) + base);
    return (uint16_t)(sign | (two > 0xFF000000u ? 0x7E00u : ((r >> 13) & 0x7C00u) + (r & 0x0FFFu)));
  }
};
enum Type { TYPE_F32 = 0, TYPE_BF16 = 1, TYPE_F16 = 2 };

#ifndef __CUDACC__
// What this processor can run: 0 plain, 1 AVX2, 2 AVX-512
inline int isa() {
#if FTLAB_X86
  static const int best = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") ? 2
                          : __builtin_cpu_supports("avx2") ? 1 : 0;
  return best;
#else
  return 0;
#endif
}
#endif

}  // namespace ftlab
