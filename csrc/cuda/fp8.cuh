// The two formats of 8 bits (arXiv 2209.05433): e4m3 up to 448, without infinity, and e5m2 up to
// 57344. What is finite is rounded to the nearest, to even in a tie, and cut off at the largest;
// what is not becomes NaN, so that an overflow is not hidden.

#pragma once

#include "vector.cuh"

namespace megatron {

__device__ __forceinline__ uint32_t bits_of(float x) {
#if defined(MEGATRON_EMULATED)
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#else
  return __float_as_uint(x);
#endif
}

__device__ __forceinline__ float float_of(uint32_t bits) {
#if defined(MEGATRON_EMULATED)
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#else
  return __uint_as_float(bits);
#endif
}

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kFp8NaN = 0x7fu;

// `kMantissa` bits behind the point and an exponent shifted by `kBias`, without the hardware, which
// has the conversion from compute capability 8.9 on.
template <int kMantissa, int kBias, uint32_t kLargest>
__device__ __forceinline__ uint32_t narrowed(float x) {
  uint32_t bits = bits_of(x), magnitude = bits & kMagnitude, sign = (bits >> 24) & 0x80u;
  if (magnitude >= kInfinity) return sign | kFp8NaN;
  constexpr int kDropped = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
  if (magnitude < kSmallestNormal) {
    // The last place of this sum is that of the subnormal numbers.
    constexpr uint32_t kShift = static_cast<uint32_t>(128 - kBias + kDropped) << 23;
    return sign | (bits_of(float_of(magnitude) + float_of(kShift)) - kShift);
  }
  magnitude += (1u << (kDropped - 1)) - 1 + ((magnitude >> kDropped) & 1);
  uint32_t value = (magnitude >> kDropped) - (static_cast<uint32_t>(127 - kBias) << kMantissa);
  return sign | (value < kLargest ? value : kLargest);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define MEGATRON_CONVERT_PAIR(format, low, high)                                          \
  uint16_t pair;                                                                          \
  asm("cvt.rn.satfinite." format "x2.f32 %0, %2, %1;" : "=h"(pair) : "f"(low), "f"(high)); \
  return pair
#endif

// Each turns two numbers into two bytes, the first of them the lower.
struct E4M3 {
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
#if defined(MEGATRON_CONVERT_PAIR)
    MEGATRON_CONVERT_PAIR("e4m3", low, high);
#else
    return narrowed<3, 7, 0x7e>(low) | narrowed<3, 7, 0x7e>(high) << 8;
#endif
  }
};

struct E5M2 {
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
#if defined(MEGATRON_CONVERT_PAIR)
    MEGATRON_CONVERT_PAIR("e5m2", low, high);
#else
    return narrowed<2, 15, 0x7b>(low) | narrowed<2, 15, 0x7b>(high) << 8;
#endif
  }
};

// The hardware would make the largest number of an infinity.
__device__ __forceinline__ float nan_unless_finite(float x) {
  return (bits_of(x) & kMagnitude) < kInfinity ? x : float_of(kMagnitude);
}

}  // namespace megatron
