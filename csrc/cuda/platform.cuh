// What the kernels need of CUDA, in three places: compiled by nvcc for a GPU; by NVRTC, which knows
// device code alone, to read how many registers a kernel takes; and by a C++ compiler for the
// emulator, which runs them on the CPU one thread after the other.

#pragma once

#if defined(MEGATRON_EMULATED)
#include "../emulation/emulator.h"
#elif defined(__CUDACC_RTC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using int64_t = long long;
using uint64_t = unsigned long long;
using int32_t = int;
using uint32_t = unsigned int;
using uint16_t = unsigned short;
using uint8_t = unsigned char;
using uintptr_t = unsigned long long;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#endif

namespace megatron {

constexpr int kWarp = 32;

#if defined(MEGATRON_EMULATED)

using Stream = void*;

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, A... arguments) {
  return emulator::run([&] { kernel(static_cast<P>(arguments)...); }, grid, block, shared);
}

inline float to_float(float x) { return x; }
inline float to_float(__half x) { return static_cast<float>(x); }
inline float to_float(__nv_bfloat16 x) { return static_cast<float>(x); }

#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared()

#else

#if defined(__CUDACC_RTC__)

using Stream = void*;

// Nothing is launched: that its address is taken makes the compiler produce the kernel.
__device__ void* launched;

template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3, dim3, size_t, Stream, A...) {
  launched = reinterpret_cast<void*>(kernel);
  return 0;
}

#else

using Stream = cudaStream_t;
constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Returns a cudaError_t, 0 where all is well.
template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream,
           A... arguments) {
  if (shared > kSharedWithoutAsking) {
    cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<P>(arguments)...);
  return static_cast<int>(cudaGetLastError());
}

#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif

}  // namespace megatron
