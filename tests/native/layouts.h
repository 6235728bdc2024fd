// Every way in which a tensor's chosen numbers are listed, for the optimizer's tests on a processor and on the stand-in for CUDA
#pragma once
#include <random>
#include <vector>
#include "adamw.h"

namespace ftlab::adamw {

// A layout with its own memory, and the places that it means, found in the plainest way
struct Layout { std::vector<int32_t> at; std::vector<uint8_t> bits; std::vector<int64_t> before, places; Chosen c; };

inline Layout layout(std::mt19937_64& r, int64_t n, int kind) {
  Layout l;
  if (kind == 0) {  // bits
    l.bits.resize((n + 7)/8);
    uint64_t share = 1 + r() % 64;
    for (int64_t i = 0; i < n; i++) {
      if (i % BLOCK == 0) l.before.push_back((int64_t)l.places.size());
      if (r() % 64 < share) { l.bits[i >> 3] |= (uint8_t)(1 << (i & 7)); l.places.push_back(i); }
    }
    l.c = {nullptr, l.bits.data(), l.before.data(), n, 0, 0, 0};
    return l;
  }
  int64_t length = kind == 1 ? 1 : 1 + r() % 40, stride = kind == 3 ? length*(1 + r() % 30) : 0, end = stride ? stride : n;
  for (int64_t j = 0; j < end/length; j++) if (r() % 4 == 0) l.at.push_back((int32_t)j);
  for (int64_t turn = 0; turn < (stride ? n/stride : 1); turn++)
    for (auto j : l.at) for (int64_t o = 0; o < length; o++) l.places.push_back(turn*stride + j*length + o);
  l.c = {l.at.data(), nullptr, nullptr, (int64_t)l.places.size(), (int64_t)l.at.size(), length, stride};
  return l;
}

}  // namespace ftlab::adamw
