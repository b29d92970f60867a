// The activation between an MLP's two products, with the bias of the first one.
//
//   plain   y = a(x + b)                            [n, f] -> [n, f]
//   gated   y = a(g + b_g) (l + b_l), x = [g | l]   [n, 2 f] -> [n, f]
//
// The backward pass makes the gradient of x and, in the same pass, the sums over rows that are the
// bias's: each block sums its rows, and a second kernel the blocks, both in a fixed order.

#include "dispatch.cuh"
#include "reduce.cuh"

namespace megatron {
namespace {

enum class Kind : int64_t { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

// Each with its value and its derivative.
struct Gelu {  // x Phi(x), arXiv 1606.08415
  static __device__ __forceinline__ float value(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  }
  static __device__ __forceinline__ float slope(float x) {
    float phi = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return phi + x * 0.39894228040143268f * expf(-0.5f * x * x);
  }
};

struct GeluTanh {  // its approximation, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
  static constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
  static __device__ __forceinline__ float value(float x) {
    return 0.5f * x * (1.0f + tanhf(kScale * (x + kCubic * x * x * x)));
  }
  static __device__ __forceinline__ float slope(float x) {
    float t = tanhf(kScale * (x + kCubic * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kScale * (1.0f + 3.0f * kCubic * x * x);
  }
};

struct Silu {  // x sigmoid(x)
  static __device__ __forceinline__ float value(float x) { return x / (1.0f + expf(-x)); }
  static __device__ __forceinline__ float slope(float x) {
    float s = 1.0f / (1.0f + expf(-x));
    return s * (1.0f + x * (1.0f - s));
  }
};

constexpr int kThreads = 128;  // along a row, a pack each
constexpr int kRows = 64;      // that a block of the backward pass sums

template <typename A, typename T, int V, bool kGated>
__global__ void __launch_bounds__(kThreads)
    activate(const T* x, const T* bias, T* y, int64_t rows, int64_t columns) {
  int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (column >= columns) return;
  int64_t width = kGated ? 2 * columns : columns;
  float b[V] = {}, b_linear[V] = {};
  if (bias) load<V>(bias + column, b);
  if (kGated && bias) load<V>(bias + columns + column, b_linear);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float in[V], linear[V], out[V];
    load<V>(x + row * width + column, in);
    if (kGated) load<V>(x + row * width + columns + column, linear);
#pragma unroll
    for (int i = 0; i < V; i++) {
      out[i] = A::value(in[i] + b[i]);
      if (kGated) out[i] *= linear[i] + b_linear[i];
    }
    store<V>(y + row * columns + column, out);
  }
}

// `sums` is float [blocks of rows, width], or null where there is no bias.
template <typename A, typename T, int V, bool kGated>
__global__ void __launch_bounds__(kThreads)
    differentiate(const T* grad, const T* x, const T* bias, T* grad_x, float* sums, int64_t rows,
                  int64_t columns) {
  int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (column >= columns) return;
  int64_t width = kGated ? 2 * columns : columns;
  float b[V] = {}, b_linear[V] = {}, total[V] = {}, total_linear[V] = {};
  if (bias) load<V>(bias + column, b);
  if (kGated && bias) load<V>(bias + columns + column, b_linear);
  int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  int64_t last = first + kRows < rows ? first + kRows : rows;
  for (int64_t row = first; row < last; row++) {
    float g[V], in[V], linear[V];
    load<V>(grad + row * columns + column, g);
    load<V>(x + row * width + column, in);
    if (kGated) load<V>(x + row * width + columns + column, linear);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float at = in[i] + b[i];
      in[i] = g[i] * A::slope(at);
      if (kGated) {
        in[i] *= linear[i] + b_linear[i];
        linear[i] = g[i] * A::value(at);
        total_linear[i] += linear[i];
      }
      total[i] += in[i];
    }
    store<V>(grad_x + row * width + column, in);
    if (kGated) store<V>(grad_x + row * width + columns + column, linear);
  }
  if (!sums) return;
#pragma unroll
  for (int i = 0; i < V; i++) {
    float* own = sums + blockIdx.x * width + column + i;
    own[0] = total[i];
    if (kGated) own[columns] = total_linear[i];
  }
}

// Calls `work` with the activation, the format, and how many elements a thread takes at once.
template <typename Work>
int with_kind(int64_t kind, Work work) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kGelu:
      return work(Type<Gelu>());
    case Kind::kGeluTanh:
      return work(Type<GeluTanh>());
    case Kind::kSilu:
      return work(Type<Silu>());
  }
  return kUnknownFormat;
}

}  // namespace
}  // namespace megatron

EXPORT int bias_activation_forward(const void* x, const void* bias, void* y, int64_t rows,
                                   int64_t columns, int64_t kind, int64_t gated, int64_t format,
                                   megatron::Stream stream) {
  using namespace megatron;
  return with_kind(kind, [&](auto a) {
    return with_format(format, [&](auto t) {
      using A = typename decltype(a)::type;
      using T = typename decltype(t)::type;
      bool packs = fits<T>(columns, x, bias, y);
      int64_t in_row = divide_up(columns, kThreads * (packs ? kFull<T> : 1));
      dim3 grid(static_cast<unsigned>(rows < 8192 ? rows : 8192), static_cast<unsigned>(in_row));
      auto kernel = packs ? (gated ? activate<A, T, kFull<T>, true> : activate<A, T, kFull<T>, false>)
                          : (gated ? activate<A, T, 1, true> : activate<A, T, 1, false>);
      return launch(kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(x),
                    static_cast<const T*>(bias), static_cast<T*>(y), rows, columns);
    });
  });
}

// `sums` has bias_activation_sums(rows) rows of floats as wide as x, or is null.
EXPORT int bias_activation_backward(const void* grad, const void* x, const void* bias, void* grad_x,
                                    void* sums, int64_t rows, int64_t columns, int64_t kind,
                                    int64_t gated, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_kind(kind, [&](auto a) {
    return with_format(format, [&](auto t) {
      using A = typename decltype(a)::type;
      using T = typename decltype(t)::type;
      bool packs = fits<T>(columns, grad, x, bias, grad_x);
      int64_t in_row = divide_up(columns, kThreads * (packs ? kFull<T> : 1));
      dim3 grid(static_cast<unsigned>(divide_up(rows, kRows)), static_cast<unsigned>(in_row));
      auto kernel = packs ? (gated ? differentiate<A, T, kFull<T>, true>
                                   : differentiate<A, T, kFull<T>, false>)
                          : (gated ? differentiate<A, T, 1, true> : differentiate<A, T, 1, false>);
      return launch(kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(grad),
                    static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(grad_x),
                    static_cast<float*>(sums), rows, columns);
    });
  });
}

EXPORT int64_t bias_activation_sums(int64_t rows) {
  return megatron::divide_up(rows, megatron::kRows);
}
