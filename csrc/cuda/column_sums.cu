// The second stage of gradients that are sums over rows: [parts, columns] floats, which the first
// stage has left, to [columns] of the parameter's format. A thread sums a column in the order of
// the parts, so that the result is the same each time.

#include "dispatch.cuh"

namespace megatron {
namespace {

constexpr int kColumns = 32;
constexpr int kParts = 32;

// A block has kColumns x kParts threads; those with the same column take every kParts-th part.
template <typename T>
__global__ void __launch_bounds__(kColumns* kParts)
    sum_columns(const float* parts, T* to, int64_t count, int64_t columns) {
  __shared__ float partial[kParts][kColumns];
  int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float total = 0.0f;
  if (column < columns)
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < count; part += kParts)
      total += parts[part * columns + column];
  partial[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
#pragma unroll
    for (int i = 1; i < kParts; i++) total += partial[i][threadIdx.x];
    to[column] = Format<T>::from(total);
  }
}

}  // namespace
}  // namespace megatron

EXPORT int column_sums(const void* parts, void* to, int64_t count, int64_t columns, int64_t format,
                       megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    dim3 grid(static_cast<unsigned>(divide_up(columns, kColumns)));
    return launch(sum_columns<T>, grid, dim3(kColumns, kParts), 0, stream,
                  static_cast<const float*>(parts), static_cast<T*>(to), count, columns);
  });
}
