// From the numbers that Python hands over to template arguments.

#pragma once

#include "vector.cuh"

namespace megatron {

// Number formats, as `megatron/ops/kernels.py` counts them.
enum class Code : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kUnknownFormat = 1;  // cudaErrorInvalidValue

template <typename T>
struct Type {
  using type = T;
};

// Calls `work` with the format's Type; returns what it returns.
template <typename Work>
int with_format(int64_t code, Work work) {
  switch (static_cast<Code>(code)) {
    case Code::kFloat32:
      return work(Type<float>());
    case Code::kFloat16:
      return work(Type<__half>());
    case Code::kBFloat16:
      return work(Type<__nv_bfloat16>());
  }
  return kUnknownFormat;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace megatron

#define EXPORT extern "C"
