// Sums and maxima over a warp and over a block. The order of the operations is fixed, so that a
// kernel gives the same bits each time.

#pragma once

#include "platform.cuh"

namespace megatron {

struct Sum {
  static constexpr float kNothing = 0.0f;
  template <typename T>
  static __device__ __forceinline__ T of(T a, T b) { return a + b; }
};

struct Max {
  static constexpr float kNothing = -3.402823466e38f;
  static __device__ __forceinline__ float of(float a, float b) { return a > b ? a : b; }
};

// The whole of a warp's values, in every lane of it.
template <typename Operation, typename T>
__device__ __forceinline__ T over_warp(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = Operation::of(value, __shfl_xor_sync(0xffffffffu, value, mask));
  return value;
}

// The whole of a block's values, in every thread of it. The block has kThreads threads in x, a
// multiple of 32; `scratch` are kThreads / 32 elements of shared memory, free again afterwards.
template <typename Operation, int kThreads, typename T>
__device__ __forceinline__ T over_block(T value, T* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  value = over_warp<Operation>(value);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; i++) value = Operation::of(value, scratch[i]);
    __syncthreads();
  }
  return value;
}

}  // namespace megatron
