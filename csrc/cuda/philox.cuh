// Random numbers as a pure function of a key and a place: Philox 4x32 with ten rounds (Salmon et
// al., Parallel random numbers: as easy as 1, 2, 3, SC 2011). What is dropped in the forward pass
// is found again in the backward pass, and nothing has to be kept of it.
//
// Element e of draw d of a key is word e % 4 of the counter (e / 4, d): `megatron/ops/philox.py`
// says the same in PyTorch.

#pragma once

#include "platform.cuh"

namespace megatron {

struct Words {
  uint32_t of[4];
};

__device__ __forceinline__ Words philox(uint64_t key, uint64_t group, uint64_t draw) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(draw), c3 = static_cast<uint32_t>(draw >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which of the V elements from `first` on stay: those whose number is not below the threshold,
// probability 2^32. With V > 1, `first` is a multiple of V and V of 4.
template <int V>
__device__ __forceinline__ void keep(uint64_t key, uint64_t draw, uint64_t first,
                                     uint32_t threshold, bool (&stays)[V]) {
  if constexpr (V == 1) {
    // By comparison: an index that is not known when compiling would put the words into memory.
    Words words = philox(key, first / 4, draw);
    uint32_t word = words.of[0];
#pragma unroll
    for (int j = 1; j < 4; j++) word = first % 4 == j ? words.of[j] : word;
    stays[0] = word >= threshold;
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      Words words = philox(key, (first + i) / 4, draw);
#pragma unroll
      for (int j = 0; j < 4; j++) stays[i + j] = words.of[j] >= threshold;
    }
  }
}

}  // namespace megatron
