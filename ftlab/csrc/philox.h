// Random numbers that need no memory: number i of tensor t is a function of (seed, t, i), computed where it is used.
// One header for host and device; whatever the CPU tests say of it is said of the GPU's numbers too.
// No multiply-add is fused anywhere (-ffp-contract=off, -fmad=false): each operation rounds once, on every machine alike,
// so that torch, C++ and CUDA agree to the last bit, and a run kept as a list of seeds can be replayed elsewhere.
#pragma once
#include "common.h"

namespace ftlab {

// 32 counters stand side by side: one for each thread of a warp, or four AVX2 vectors. They make one *tile* of numbers,
// laid out so that neighbouring lanes touch neighbouring numbers: tile t of a tensor holds numbers t*TILE to (t+1)*TILE - 1.
constexpr int LANES = 32, NORMALS = 4*LANES, SIGNS = 128*LANES;  // a counter gives 128 bits: 4 normal numbers, or 128 signs

// Philox4x32-10 (Salmon et al. 2011): ten rounds of multiply, swap and xor make 128 random bits of a counter and a key. All four
// words of the counter are used: a, b the position inside the tensor, c, d the tensor. Key: the seed.
FTLAB_HD void mix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t& k0, uint32_t& k1) {
  uint32_t p = 0xD2511F53u*a, q = 0xCD9E8D57u*c;  // the lower halves of two products, and the upper ones
  uint32_t P = (uint32_t)((uint64_t)0xD2511F53u*a >> 32), Q = (uint32_t)((uint64_t)0xCD9E8D57u*c >> 32);
  a = Q ^ b ^ k0; b = q;
  c = P ^ d ^ k1; d = p;
  k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
}
FTLAB_HD void philox(uint64_t seed, uint64_t tensor, uint64_t position, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  a = (uint32_t)position; b = (uint32_t)(position >> 32); c = (uint32_t)tensor; d = (uint32_t)(tensor >> 32);
  // written out, as compilers turn the loop over lanes into vector instructions only if there is no loop within it
  mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1);
  mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1); mix(a, b, c, d, k0, k1);
}

// log(u) for 2^-32 <= u <= 1: the exponent times log 2, and a polynomial for the mantissa (Cephes' logf)
FTLAB_HD float log_(float u) {
  int32_t e = (int32_t)(bits(u) - 0x3f3504f3u) >> 23;  // u = m * 2^e with m from sqrt(1/2) to sqrt(2), by whole numbers alone
  float y = number(bits(u) - ((uint32_t)e << 23)) - 1.f, y2 = y*y, y4 = y2*y2;
  float r = (3.3333331174e-1f - 2.4999993993e-1f*y) + (2.0000714765e-1f - 1.6668057665e-1f*y)*y2;  // in pairs: no long chain of waits
  r = r + y4*(((1.4249322787e-1f - 1.2420140846e-1f*y) + (1.1676998740e-1f - 1.1514610310e-1f*y)*y2) + 7.0376836292e-2f*y4);
  return (y + (r*y - 0.5f)*y2) + 0.69314718f*(float)e;
}

// Cosine and sine of x*2*pi/2^32. The nearest quarter turn is found in whole numbers, exactly; the polynomials see at most pi/4.
FTLAB_HD void turn(uint32_t x, float& cosine, float& sine) {
  uint32_t quarter = (x + 0x20000000u) >> 30;
  float f = (float)(int32_t)(x - (quarter << 30))*1.4629180792671596e-9f, g = f*f;
  float s = ((-1.9515295891e-4f*g + 8.3321608736e-3f)*g - 1.6666654611e-1f)*g*f + f;
  float c = ((2.443315711809948e-5f*g - 1.388731625493765e-3f)*g + 4.166664568298827e-2f)*g*g - 0.5f*g + 1.f;
  bool odd = quarter & 1;
  cosine = number(bits(odd ? s : c) ^ (((quarter + 1) & 2) << 30));
  sine = number(bits(odd ? c : s) ^ ((quarter & 2) << 30));
}

// Box-Muller: two random words make two independent normal numbers, a radius and an angle. The radius' word becomes a number
// above 0 and up to 1 by 31 of its bits, so that the tails reach 6.6 standard deviations.
FTLAB_HD void normals(uint32_t x, uint32_t y, float& z0, float& z1) {
  float u = ((float)(int32_t)(x >> 1) + 0.5f)*4.656612873077393e-10f;
  float radius = sqrtf(-2.f*log_(u)), cosine, sine;
  turn(y, cosine, sine);
  z0 = radius*cosine; z1 = radius*sine;
}

// bfloat16 and beside it what it leaves of the float32 meant: the upper half rounded (halves away from 0), and the rest, which is signed
FTLAB_HD float join(uint16_t high, int16_t low) { return number(((uint32_t)high << 16) + (uint32_t)(int32_t)low); }
FTLAB_HD void split(float v, uint16_t& high, int16_t& low) {
  uint32_t b = v != v ? 0x7fc00000u : bits(v);
  high = (uint16_t)((b + 0x8000u) >> 16); low = (int16_t)b;
}

}  // namespace ftlab
