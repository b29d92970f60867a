// The activation between an MLP's two products, with the bias of the first one.
//
//   plain   y = a(x + b)                            [n, f] -> [n, f]
//   gated   y = a(g + b_g) (l + b_l), x = [g | l]   [n, 2 f] -> [n, f]
//
// The backward pass makes the gradient of x and, in the same pass, the sums over rows that are the
// bias's: each block sums its rows, and a second kernel the blocks, both in a fixed order.
//
// At the speed of memory a multiprocessor has about 35 instructions for an element of 16 bits, and
// the erff and tanhf of the library would use them up. The values need no more than 16 bits either,
// and formulas made of one exponential take their place.

#include "dispatch.cuh"

namespace megatron {
namespace {

enum class Kind : int64_t { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

// A value and its derivative.
struct Point {
  float value, slope;
};

// Phi(x) and exp(-x^2 / 2). The short form is formula 7.1.26 of Abramowitz and Stegun for erfc,
// which is off by 1.5e-7 at most and, being a product with the exponential, keeps its digits where
// Phi is small.
template <bool kShort>
__device__ __forceinline__ void normal(float x, float& phi, float& bell) {
  if constexpr (kShort) {
    bell = __expf(-0.5f * x * x);
    float t = __fdividef(1.0f, 1.0f + 0.3275911f * 0.70710678f * fabsf(x));
    float tail = 1.061405429f;
    tail = fmaf(tail, t, -1.453152027f);
    tail = fmaf(tail, t, 1.421413741f);
    tail = fmaf(tail, t, -0.284496736f);
    tail = fmaf(tail, t, 0.254829592f);
    tail *= 0.5f * t * bell;
    phi = x > 0.0f ? 1.0f - tail : tail;
  } else {
    bell = expf(-0.5f * x * x);
    phi = 0.5f * erfcf(-0.70710678118654752f * x);
  }
}

template <bool kShort>
struct Gelu {  // x Phi(x), arXiv 1606.08415
  static __device__ __forceinline__ Point at(float x) {
    float phi, bell;
    normal<kShort>(x, phi, bell);
    return {x * phi, phi + x * 0.39894228040143268f * bell};
  }
};

// The logistic function and its complement; neither is a difference that loses digits.
template <bool kShort>
__device__ __forceinline__ void logistic(float x, float& s, float& rest) {
  float e = kShort ? __expf(-fabsf(x)) : expf(-fabsf(x));
  float large = kShort ? __fdividef(1.0f, 1.0f + e) : 1.0f / (1.0f + e);
  s = x > 0.0f ? large : e * large;
  rest = x > 0.0f ? e * large : large;
}

template <bool kShort>
struct GeluTanh {  // its approximation, 0.5 x (1 + tanh(u)) = x s(2 u), u = sqrt(2/pi)(x + c x^3)
  static __device__ __forceinline__ Point at(float x) {
    constexpr float kTwice = 2.0f * 0.79788456080286536f, kCubic = 0.044715f;
    float s, rest, square = x * x;
    logistic<kShort>(kTwice * x * (1.0f + kCubic * square), s, rest);
    return {x * s, s + x * s * rest * kTwice * (1.0f + 3.0f * kCubic * square)};
  }
};

template <bool kShort>
struct Silu {  // x s(x)
  static __device__ __forceinline__ Point at(float x) {
    float s, rest;
    logistic<kShort>(x, s, rest);
    return {x * s, s * (1.0f + x * rest)};
  }
};

constexpr int kThreads = 128;  // along a row, a pack each
constexpr int kRows = 64;      // that a block of the backward pass sums
constexpr int kFlight = 2;     // of them that it asks for before it looks at the first
constexpr int kBlocks = 4;     // of it at a time on a multiprocessor: room for 128 registers

template <typename A, typename T, int V, bool kGated>
__global__ void __launch_bounds__(kThreads)
    activate(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t rows,
             int64_t columns) {
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
      out[i] = A::at(in[i] + b[i]).value;
      if (kGated) out[i] *= linear[i] + b_linear[i];
    }
    store<V>(y + row * columns + column, out);
  }
}

// `sums` is float [blocks of rows, width], or null where there is no bias.
template <typename A, typename T, int V, bool kGated>
__global__ void __launch_bounds__(kThreads, kBlocks)
    differentiate(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ bias,
                  T* __restrict__ grad_x, float* __restrict__ sums, int64_t rows,
                  int64_t columns) {
  int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (column >= columns) return;
  int64_t width = kGated ? 2 * columns : columns;
  float b[V] = {}, b_linear[V] = {}, total[V] = {}, total_linear[V] = {};
  if (bias) load<V>(bias + column, b);
  if (kGated && bias) load<V>(bias + columns + column, b_linear);
  int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  int64_t last = first + kRows < rows ? first + kRows : rows;
  for (int64_t row = first; row < last; row += kFlight) {
    float g[kFlight][V], in[kFlight][V], linear[kFlight][V];
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      if (row + k >= last) continue;
      load<V>(grad + (row + k) * columns + column, g[k]);
      load<V>(x + (row + k) * width + column, in[k]);
      if (kGated) load<V>(x + (row + k) * width + columns + column, linear[k]);
    }
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      if (row + k >= last) continue;
#pragma unroll
      for (int i = 0; i < V; i++) {
        Point point = A::at(in[k][i] + b[i]);
        in[k][i] = g[k][i] * point.slope;
        if (kGated) {
          in[k][i] *= linear[k][i] + b_linear[i];
          linear[k][i] = g[k][i] * point.value;
          total_linear[i] += linear[k][i];
        }
        total[i] += in[k][i];
      }
      store<V>(grad_x + (row + k) * width + column, in[k]);
      if (kGated) store<V>(grad_x + (row + k) * width + columns + column, linear[k]);
    }
  }
  if (!sums) return;
  float* own = sums + static_cast<int64_t>(blockIdx.x) * width + column;
#pragma unroll
  for (int i = 0; i < V; i++) {
    own[i] = total[i];
    if (kGated) own[columns + i] = total_linear[i];
  }
}

// Calls `work` with the activation in the format's precision, and the format.
template <typename Work>
int with_kind(int64_t kind, int64_t format, Work work) {
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr bool kShort = sizeof(T) == 2;
    switch (static_cast<Kind>(kind)) {
      case Kind::kGelu:
        return work(Type<Gelu<kShort>>(), t);
      case Kind::kGeluTanh:
        return work(Type<GeluTanh<kShort>>(), t);
      case Kind::kSilu:
        return work(Type<Silu<kShort>>(), t);
    }
    return kUnknownFormat;
  });
}

}  // namespace
}  // namespace megatron

EXPORT int bias_activation_forward(const void* x, const void* bias, void* y, int64_t rows,
                                   int64_t columns, int64_t kind, int64_t gated, int64_t format,
                                   megatron::Stream stream) {
  using namespace megatron;
  return with_kind(kind, format, [&](auto a, auto t) {
    using A = typename decltype(a)::type;
    using T = typename decltype(t)::type;
    bool packs = fits<T>(columns, x, bias, y);
    int64_t in_row = divide_up(columns, kThreads * (packs ? kFull<T> : 1));
    dim3 grid(static_cast<unsigned>(rows < 65536 ? rows : 65536), static_cast<unsigned>(in_row));
    auto kernel = packs ? (gated ? activate<A, T, kFull<T>, true> : activate<A, T, kFull<T>, false>)
                        : (gated ? activate<A, T, 1, true> : activate<A, T, 1, false>);
    return launch(kernel, grid, dim3(kThreads), 0, stream, static_cast<const T*>(x),
                  static_cast<const T*>(bias), static_cast<T*>(y), rows, columns);
  });
}

// `sums` has bias_activation_sums(rows) rows of floats as wide as x, or is null.
EXPORT int bias_activation_backward(const void* grad, const void* x, const void* bias, void* grad_x,
                                    void* sums, int64_t rows, int64_t columns, int64_t kind,
                                    int64_t gated, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_kind(kind, format, [&](auto a, auto t) {
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
}

EXPORT int64_t bias_activation_sums(int64_t rows) {
  return megatron::divide_up(rows, megatron::kRows);
}
