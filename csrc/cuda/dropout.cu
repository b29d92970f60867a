// Dropout of what a block gives to the residual stream, with the block's bias, and their sum.
//
//   y = r + m (x + b) / (1 - p)    [n, h]    m is 0 with probability p and else 1 (arXiv 1207.0580)
//
// m is a function of a key and of an element's place (philox.cuh): the backward pass makes it again
// and sums the bias's gradient on its way, each block its rows; column_sums.cu sums the blocks. The
// key is read from memory, so that a recorded graph can be run with another one.
//
// x, b and their gradients have a format of their own, X; the stream, y and its gradient have R.

#include "dispatch.cuh"
#include "philox.cuh"

namespace megatron {
namespace {

constexpr int kAlong = 32;   // threads along a row, a pack each
constexpr int kAcross = 8;   // rows of a block that are worked on at once
constexpr int kFlight = 4;   // rows of a thread that are loaded at once
constexpr int kStride = kAcross * kFlight;
constexpr int kSummed = 64;  // rows that a block of the backward pass sums

// Elements that a thread takes at once: 16 bytes of the narrower format.
template <typename X, typename R>
constexpr int kPack = kFull<X> > kFull<R> ? kFull<X> : kFull<R>;

// Where no element is dropped the threshold is 0, and there need not be a key.
struct Dropout {
  const uint64_t* key;
  uint64_t draw;
  uint32_t threshold;
  float scale;

  __device__ __forceinline__ uint64_t read_key() const { return threshold ? *key : 0; }

  // To `values`, which stand at `place` and behind it.
  template <int V>
  __device__ __forceinline__ void apply(uint64_t from, int64_t place, float (&values)[V]) const {
    if (!threshold) return;
    bool stays[V];
    keep<V>(from, draw, static_cast<uint64_t>(place), threshold, stays);
#pragma unroll
    for (int i = 0; i < V; i++) values[i] = stays[i] ? values[i] * scale : 0.0f;
  }
};

// `V` elements, in accesses of at most 16 bytes.
template <int V, typename T>
__device__ __forceinline__ void load_all(const T* from, float (&to)[V]) {
  constexpr int kPart = V < kFull<T> ? V : kFull<T>;
#pragma unroll
  for (int start = 0; start < V; start += kPart) {
    float part[kPart];
    load<kPart>(from + start, part);
#pragma unroll
    for (int i = 0; i < kPart; i++) to[start + i] = part[i];
  }
}

template <int V, typename T>
__device__ __forceinline__ void store_all(T* to, const float (&from)[V]) {
  constexpr int kPart = V < kFull<T> ? V : kFull<T>;
#pragma unroll
  for (int start = 0; start < V; start += kPart) {
    float part[kPart];
#pragma unroll
    for (int i = 0; i < kPart; i++) part[i] = from[start + i];
    store<kPart>(to + start, part);
  }
}

// A block has kAlong packs of columns and `kRows` rows; blocks that follow one another lie side by
// side, so that a row is read as a whole.
template <int V, int kRows>
struct Tile {
  int64_t rows, columns, column, part;

  __device__ __forceinline__ Tile(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    uint32_t across = static_cast<uint32_t>((columns / V + kAlong - 1) / kAlong);
    column = (static_cast<int64_t>(blockIdx.x % across) * kAlong + threadIdx.x) * V;
    part = blockIdx.x / across;
  }
  __device__ __forceinline__ bool has_columns() const { return column < columns; }
  __device__ __forceinline__ int64_t first() const { return part * kRows + threadIdx.y; }

  // The pack's place in a row, or that of the nearest one there is: loads need no condition.
  __device__ __forceinline__ int64_t nearest(int64_t row) const {
    return min(row, rows - 1) * columns + min(column, columns - V);
  }
};

template <int V, int kRows>
dim3 tiles(int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(divide_up(columns / V, kAlong) * divide_up(rows, kRows)));
}

template <typename X, typename R, int V>
__global__ void __launch_bounds__(kAlong* kAcross)
    add(const X* x, const X* bias, const R* residual, R* y, Dropout dropout, int64_t rows,
        int64_t columns) {
  Tile<V, kStride> tile(rows, columns);
  if (!tile.has_columns()) return;
  float values[kFlight][V], sum[kFlight][V] = {}, b[V] = {};
#pragma unroll
  for (int i = 0; i < kFlight; i++)
    load_all<V>(x + tile.nearest(tile.first() + i * kAcross), values[i]);
  if (residual) {
#pragma unroll
    for (int i = 0; i < kFlight; i++)
      load_all<V>(residual + tile.nearest(tile.first() + i * kAcross), sum[i]);
  }
  if (bias) load_all<V>(bias + tile.column, b);
  uint64_t key = dropout.read_key();
#pragma unroll
  for (int i = 0; i < kFlight; i++) {
    int64_t row = tile.first() + i * kAcross;
    if (row >= rows) return;
    int64_t place = row * columns + tile.column;
#pragma unroll
    for (int j = 0; j < V; j++) values[i][j] += b[j];
    dropout.apply<V>(key, place, values[i]);
#pragma unroll
    for (int j = 0; j < V; j++) sum[i][j] += values[i][j];
    store_all<V>(y + place, sum[i]);
  }
}

// `grad_x` may be null, and so may `sums`, float [parts, columns].
template <typename X, typename R, int V>
__global__ void __launch_bounds__(kAlong* kAcross)
    differentiate(const R* grad, X* grad_x, float* sums, Dropout dropout, int64_t rows,
                  int64_t columns) {
  __shared__ float partial[kAcross][V][kAlong + 1];
  Tile<V, kSummed> tile(rows, columns);
  float total[V] = {};
#pragma unroll 1
  for (int start = 0; start < kSummed; start += kStride) {
    float values[kFlight][V];
#pragma unroll
    for (int i = 0; i < kFlight; i++)
      load_all<V>(grad + tile.nearest(tile.first() + start + i * kAcross), values[i]);
    uint64_t key = dropout.read_key();
#pragma unroll
    for (int i = 0; i < kFlight; i++) {
      int64_t row = tile.first() + start + i * kAcross;
      if (row >= rows || !tile.has_columns()) continue;
      int64_t place = row * columns + tile.column;
      dropout.apply<V>(key, place, values[i]);
#pragma unroll
      for (int j = 0; j < V; j++) total[j] += values[i][j];
      if (grad_x) store_all<V>(grad_x + place, values[i]);
    }
  }
  if (!sums) return;
#pragma unroll
  for (int j = 0; j < V; j++) partial[threadIdx.y][j][threadIdx.x] = total[j];
  __syncthreads();
  // The block's columns one after the other, so that neighbours write side by side.
  int own = threadIdx.y * kAlong + threadIdx.x;
  int64_t column = tile.column - threadIdx.x * V + own;
  if (own >= kAlong * V || column >= columns) return;
  float whole = 0.0f;
#pragma unroll
  for (int i = 0; i < kAcross; i++) whole += partial[i][own % V][own / V];
  sums[tile.part * columns + column] = whole;
}

Dropout dropout_of(const void* key, int64_t draw, int64_t threshold, float scale) {
  return {static_cast<const uint64_t*>(key), static_cast<uint64_t>(draw),
          static_cast<uint32_t>(threshold), scale};
}

// Calls `work` with the format of x and that of the stream.
template <typename Work>
int with_formats(int64_t format, int64_t stream_format, Work work) {
  return with_format(format, [&](auto x) {
    return with_format(stream_format, [&](auto r) { return work(x, r); });
  });
}

}  // namespace
}  // namespace megatron

EXPORT int bias_dropout_add_forward(const void* x, const void* bias, const void* residual, void* y,
                                    const void* key, int64_t draw, int64_t threshold, float scale,
                                    int64_t rows, int64_t columns, int64_t format,
                                    int64_t stream_format, megatron::Stream stream) {
  using namespace megatron;
  return with_formats(format, stream_format, [&](auto tx, auto tr) {
    using X = typename decltype(tx)::type;
    using R = typename decltype(tr)::type;
    constexpr int V = kPack<X, R>;
    bool packs = columns % V == 0 && fits<X>(columns, x, bias, residual, y);
    dim3 grid = packs ? tiles<V, kStride>(rows, columns) : tiles<1, kStride>(rows, columns);
    return launch(packs ? add<X, R, V> : add<X, R, 1>, grid, dim3(kAlong, kAcross), 0, stream,
                  static_cast<const X*>(x), static_cast<const X*>(bias),
                  static_cast<const R*>(residual), static_cast<R*>(y),
                  dropout_of(key, draw, threshold, scale), rows, columns);
  });
}

// `sums` has bias_dropout_add_sums(rows) rows of floats as wide as x, or is null; so may grad_x be.
EXPORT int bias_dropout_add_backward(const void* grad, void* grad_x, void* sums, const void* key,
                                     int64_t draw, int64_t threshold, float scale, int64_t rows,
                                     int64_t columns, int64_t format, int64_t stream_format,
                                     megatron::Stream stream) {
  using namespace megatron;
  return with_formats(format, stream_format, [&](auto tx, auto tr) {
    using X = typename decltype(tx)::type;
    using R = typename decltype(tr)::type;
    constexpr int V = kPack<X, R>;
    bool packs = columns % V == 0 && fits<X>(columns, grad, grad_x);
    dim3 grid = packs ? tiles<V, kSummed>(rows, columns) : tiles<1, kSummed>(rows, columns);
    return launch(packs ? differentiate<X, R, V> : differentiate<X, R, 1>, grid,
                  dim3(kAlong, kAcross), 0, stream, static_cast<const R*>(grad),
                  static_cast<X*>(grad_x), static_cast<float*>(sums),
                  dropout_of(key, draw, threshold, scale), rows, columns);
  });
}

EXPORT int64_t bias_dropout_add_sums(int64_t rows) {
  return megatron::divide_up(rows, megatron::kSummed);
}
