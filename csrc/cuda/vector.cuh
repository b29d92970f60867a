// Values of any number format in packs of 16 bytes, computed in float32.

#pragma once

#include "platform.cuh"

namespace megatron {

template <typename T>
struct Format;

template <>
struct Format<float> {
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <>
struct Format<__half> {
  static __device__ __forceinline__ __half from(float x) { return __half(x); }
};
template <>
struct Format<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __nv_bfloat16(x); }
};

// `V` elements that are loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// Elements of one access of 16 bytes.
template <typename T>
constexpr int kFull = 16 / sizeof(T);

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
#if defined(MEGATRON_EMULATED)
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, V>)) emulator::fail("misaligned load");
#endif
  Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; i++) to[i] = to_float(pack.values[i]);
}

// One instruction for a pack, said in PTX: of a plain assignment nvcc makes one for each 4 bytes.
template <typename P>
__device__ __forceinline__ void write(void* to, const P& pack) {
#if !defined(MEGATRON_EMULATED)
  if constexpr (sizeof(P) == 16) {
    uint32_t words[4];
    memcpy(words, &pack, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
    return;
  } else if constexpr (sizeof(P) == 8) {
    uint32_t words[2];
    memcpy(words, &pack, 8);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]) : "memory");
    return;
  }
#endif
  *static_cast<P*>(to) = pack;
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
#if defined(MEGATRON_EMULATED)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Pack<T, V>)) emulator::fail("misaligned store");
#endif
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.values[i] = Format<T>::from(from[i]);
  write(to, pack);
}

// What a value becomes by being stored, for kernels that go on with what others will read.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(Format<T>::from(x));
}

// Whether rows of `columns` elements at all these addresses can be read in whole packs.
template <typename T, typename... P>
bool fits(int64_t columns, P... pointers) {
  bool aligned = (true && ... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
  return aligned && columns % kFull<T> == 0;
}

}  // namespace megatron
