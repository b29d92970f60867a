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

// A pack as it lies in memory.
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> fetch(const T* from) {
#if defined(MEGATRON_EMULATED)
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, V>)) emulator::fail("misaligned load");
#endif
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

// To global memory by one instruction, said in PTX: where packs are stored in an unrolled loop or
// behind a condition, the compiler makes a store of each element.
template <typename T, int V>
__device__ __forceinline__ void put(T* to, const Pack<T, V>& pack) {
#if defined(MEGATRON_EMULATED)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(pack)) emulator::fail("misaligned store");
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
#else
  uint32_t words[sizeof(pack) < 4 ? 1 : sizeof(pack) / 4];
  memcpy(words, &pack, sizeof(pack));
  if constexpr (sizeof(pack) == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  else if constexpr (sizeof(pack) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words[0]), "r"(words[1])
                 : "memory");
  else
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
#endif
}

template <typename T, int V>
__device__ __forceinline__ void widen(const Pack<T, V>& from, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; i++) to[i] = to_float(from.values[i]);
}

template <typename T, int V>
__device__ __forceinline__ void narrow(const float (&from)[V], Pack<T, V>& to) {
#pragma unroll
  for (int i = 0; i < V; i++) to.values[i] = Format<T>::from(from[i]);
}

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  widen(fetch<V>(from), to);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
  narrow(from, pack);
  put(to, pack);
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
