// LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467) of rows, by themselves or after an
// addition to the residual stream:
//
//   total = residual + dropout(x + bias)
//   y     = (total - mean) rstd w + b       LayerNorm
//   y     = total rstd w                    RMSNorm
//
// The stream (`total`, `residual`) has the format S; x, y and the parameters have the format W.
//
// A row is held in the registers of `blockDim.x` threads, one warp where it is short enough, and a
// block works on `blockDim.y` rows at once. Forward, a row that is too long, or whose addresses do
// not allow whole packs, is read again for each pass over it.
//
// Backward, with g = grad_y w and n = (total - mean) rstd,
//
//   grad_total += rstd (g - mean(g) - n mean(g n))        RMSNorm: without mean(g)
//
// A thread keeps to its columns while its block goes from row to row, so that the gradients of the
// parameters, which are sums over rows, grow in registers. Each block leaves its sums, and
// `column_sums` adds up the blocks, all in a fixed order. Where a row is too long for a block, the
// two means come from a kernel of their own, and the columns are shared among blocks.

#include "dispatch.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace megatron {
namespace {

struct Dropout {
  const int64_t* key;
  uint64_t draw;
  uint32_t threshold;  // 0: nothing is dropped, and there is no key
  float scale;
};

template <typename S, typename W>
struct Forward {
  const S* stream;  // the row to normalise, or the residual
  const W *x, *bias;
  S* total;
  const W *weight, *norm_bias;
  W* y;
  float *mean, *rstd;  // no mean: RMSNorm
  Dropout dropout;
  float epsilon;
  int64_t rows, columns;
};

template <typename S, typename W>
struct Backward {
  const W* grad;
  const S *grad_total, *total;
  const float *mean, *rstd;  // no mean: RMSNorm
  const W* weight;
  S* grad_residual;
  W* grad_x;          // null where grad_residual says the same
  float* parts;       // [gridDim.x, sums, columns]: of weight, norm_bias, bias, as far as they are
  const float* means;  // [rows, 2] from `average`, or null where a block holds a row
  bool bias;
  Dropout dropout;
  int64_t rows, columns;
};

// Elements of an access that is 16 bytes in the wider format.
template <typename S, typename W>
constexpr int kPack = kFull<S> < kFull<W> ? kFull<S> : kFull<W>;

template <typename S, typename W>
constexpr auto wider() {
  if constexpr (sizeof(S) > sizeof(W))
    return Type<S>();
  else
    return Type<W>();
}

template <typename S, typename W>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;

// Sums of a row's values over its threads, in each of them. `scratch` has room for all warps.
template <int N>
__device__ __forceinline__ void over_row(float (&values)[N], float (*scratch)[N]) {
  int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = over_warp<Sum>(values[i]);
  if (warps == 1) return;
  float(*own)[N] = scratch + threadIdx.y * warps;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) own[warp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = lane < warps ? own[lane][i] : 0.0f;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = over_warp<Sum>(values[i]);
}

template <int V>
__device__ __forceinline__ void drop(const Dropout& dropout, uint64_t key, int64_t first,
                                     float (&values)[V]) {
  if (dropout.threshold == 0) return;
  bool stays[V];
  keep<V>(key, dropout.draw, static_cast<uint64_t>(first), dropout.threshold, stays);
#pragma unroll
  for (int i = 0; i < V; i++) values[i] = stays[i] ? values[i] * dropout.scale : 0.0f;
}

__device__ __forceinline__ uint64_t key_of(const Dropout& dropout) {
  return dropout.threshold ? static_cast<uint64_t>(*dropout.key) : 0;
}

// Calls work(p, column) for this thread's packs of a row: with kHeld for the P packs that it holds,
// else for as many as there are, p being 0. Short columns make short addresses.
template <int V, int P, bool kHeld, typename Work>
__device__ __forceinline__ void over_packs(int64_t columns, Work work) {
  if constexpr (kHeld) {
    int most = static_cast<int>(columns), stride = static_cast<int>(blockDim.x) * V;
    int column = static_cast<int>(threadIdx.x) * V;
#pragma unroll
    for (int p = 0; p < P; p++)
      if (column + p * stride < most) work(p, column + p * stride);
  } else {
    int64_t stride = static_cast<int64_t>(blockDim.x) * V;
#pragma unroll 4
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * V; column < columns; column += stride)
      work(0, column);
  }
}

constexpr int kForwardElements = 32;  // of a row that a thread holds
constexpr int kForwardThreads = 512;

template <typename S, typename W, int V, bool kHeld, bool kAdd>
__global__ void __launch_bounds__(kForwardThreads, 1) normalise(Forward<S, W> of) {
  constexpr int P = kHeld ? kForwardElements / V : 1;
  __shared__ float scratch[kForwardThreads / kWarp][1];
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Past the last row there is nothing to read, but there are barriers to come to.
  int64_t columns = row < of.rows ? of.columns : 0, start = row * of.columns;
  float count = static_cast<float>(of.columns);
  uint64_t key = kAdd ? key_of(of.dropout) : 0;
  const S* source = (kAdd ? of.total : of.stream) + start;

  Pack<S, V> stream[P];
  Pack<W, V> added[P];
  float values[P][V];
  auto read = [&](int p, auto column) {
    stream[p] = fetch<V>(of.stream + start + column);
    if constexpr (kAdd) added[p] = fetch<V>(of.x + start + column);
  };
  if constexpr (kHeld) over_packs<V, P, kHeld>(columns, read);

  float sum[1] = {};
  over_packs<V, P, kHeld>(columns, [&](int p, auto column) {
    if constexpr (!kHeld) read(p, column);
    if constexpr (kAdd) {
      float addend[V], bias[V] = {};
      widen(added[p], addend);
      if (of.bias) load<V>(of.bias + column, bias);
#pragma unroll
      for (int i = 0; i < V; i++) addend[i] += bias[i];
      drop<V>(of.dropout, key, start + column, addend);
      widen(stream[p], values[p]);
#pragma unroll
      for (int i = 0; i < V; i++) addend[i] += values[p][i];
      narrow(addend, stream[p]);
      put(of.total + start + column, stream[p]);
    }
    widen(stream[p], values[p]);
#pragma unroll
    for (int i = 0; i < V; i++) sum[0] += values[p][i];
  });

  float mean = 0.0f;
  if (of.mean) {
    over_row(sum, scratch);
    mean = sum[0] / count;
  }
  auto read_again = [&](int p, auto column) {
    if constexpr (!kHeld) {
      load<V>(source + column, values[p]);
#pragma unroll
      for (int i = 0; i < V; i++) values[p][i] -= mean;
    }
  };
  float squares[1] = {};
  over_packs<V, P, kHeld>(columns, [&](int p, auto column) {
    read_again(p, column);
#pragma unroll
    for (int i = 0; i < V; i++) {
      if constexpr (kHeld) values[p][i] -= mean;
      squares[0] += values[p][i] * values[p][i];
    }
  });
  over_row(squares, scratch);
  float rstd = rsqrtf(squares[0] / count + of.epsilon);

  if (threadIdx.x == 0 && row < of.rows) {
    if (of.mean) of.mean[row] = mean;
    of.rstd[row] = rstd;
  }
  over_packs<V, P, kHeld>(columns, [&](int p, auto column) {
    read_again(p, column);
    float weight[V], bias[V] = {};
    load<V>(of.weight + column, weight);
    if (of.norm_bias) load<V>(of.norm_bias + column, bias);
#pragma unroll
    for (int i = 0; i < V; i++) weight[i] = values[p][i] * rstd * weight[i] + bias[i];
    store<V>(of.y + start + column, weight);
  });
}

constexpr int64_t kAverageThreads = 256;

// mean(g) and mean(g n) of each row, a block to a row.
template <typename S, typename W, int V>
__global__ void __launch_bounds__(kAverageThreads) average(Backward<S, W> of, float* means) {
  __shared__ float scratch[kAverageThreads / kWarp][2];
  int64_t row = blockIdx.x, start = row * of.columns;
  float mean = of.mean ? of.mean[row] : 0.0f, rstd = of.rstd[row];
  float sums[2] = {};
  over_packs<V, 1, false>(of.columns, [&](int, auto column) {
    float grad[V], values[V], weight[V];
    load<V>(of.grad + start + column, grad);
    load<V>(of.total + start + column, values);
    load<V>(of.weight + column, weight);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float g = grad[i] * weight[i];
      sums[0] += g;
      sums[1] += g * ((values[i] - mean) * rstd);
    }
  });
  over_row(sums, scratch);
  if (threadIdx.x != 0) return;
  means[2 * row] = sums[0] / static_cast<float>(of.columns);
  means[2 * row + 1] = sums[1] / static_cast<float>(of.columns);
}

// How many elements of a row a thread holds backward, and with how many others. Each element takes
// a register for every sum over rows.
template <int V, bool kAdd>
constexpr int kBackwardElements = V == 1 ? 8 : V == 8 && !kAdd ? 32 : 16;
template <int V, bool kAdd>
constexpr int kBackwardThreads = kAdd || kBackwardElements<V, kAdd> == 32 ? 384 : 512;

// Leaves the sums of the block's rows of threads in `to`, [columns].
template <int V, int P>
__device__ __forceinline__ void leave(const float (&sums)[P][V], float* scratch, float* to,
                                      int64_t first, int64_t columns) {
  int width = blockDim.x * V, thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int p = 0; p < P; p++) {
#pragma unroll
    for (int i = 0; i < V; i++) scratch[thread * V + i] = sums[p][i];
    __syncthreads();
    for (int i = thread; i < width; i += blockDim.x * blockDim.y) {
      float total = scratch[i];
      for (int other = 1; other < blockDim.y; other++) total += scratch[other * width + i];
      int64_t column = first + static_cast<int64_t>(p) * width + i;
      if (column < columns) to[column] = total;
    }
    __syncthreads();
  }
}

template <typename S, typename W, int V, bool kAdd>
__global__ void __launch_bounds__(kBackwardThreads<V, kAdd>) differentiate(Backward<S, W> of) {
  constexpr int P = kBackwardElements<V, kAdd> / V, kThreads = kBackwardThreads<V, kAdd>;
  __shared__ float scratch[kThreads / kWarp][2], left[kThreads * V];
  // The columns that this block has begin at `first`: all of them, unless `means` are given.
  int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.x * P * V;
  int64_t tile = static_cast<int64_t>(blockDim.x) * P * V, rest = of.columns - first;
  int64_t width = rest < tile ? rest : tile;
  const W* weight = of.weight + first;
  float count = static_cast<float>(of.columns);
  uint64_t key = kAdd ? key_of(of.dropout) : 0;

  float of_weight[P][V] = {}, of_norm_bias[P][V] = {}, of_bias[kAdd ? P : 1][V] = {};
  // Neighbouring rows go to different blocks, so that the last rows keep all multiprocessors busy.
  int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t base = blockIdx.x; base < of.rows; base += step) {
    int64_t row = base + static_cast<int64_t>(threadIdx.y) * gridDim.x;
    int64_t start = row * of.columns + first;
    bool live = row < of.rows;
    int64_t mine = live ? width : 0;

    Pack<S, V> total[P], stream[P];
    Pack<W, V> grad[P];
    over_packs<V, P, true>(mine, [&](int p, int column) {
      grad[p] = fetch<V>(of.grad + start + column);
      total[p] = fetch<V>(of.total + start + column);
      if (kAdd && of.grad_total) stream[p] = fetch<V>(of.grad_total + start + column);
    });
    float mean = live && of.mean ? of.mean[row] : 0.0f, rstd = live ? of.rstd[row] : 0.0f;

    float means[2] = {};
    over_packs<V, P, true>(mine, [&](int p, int column) {
      float g[V], d[V], w[V];
      widen(grad[p], g), widen(total[p], d);
      load<V>(weight + column, w);
#pragma unroll
      for (int i = 0; i < V; i++) {
        float gd = g[i] * (d[i] - mean);
        of_weight[p][i] += gd * rstd;
        of_norm_bias[p][i] += g[i];
        means[0] += g[i] * w[i];
        means[1] += gd * w[i];
      }
    });
    if (of.means) {
      means[0] = live ? of.means[2 * row] : 0.0f;
      means[1] = live ? of.means[2 * row + 1] : 0.0f;
    } else {
      over_row(means, scratch);
      means[0] /= count;
      means[1] = means[1] * rstd / count;
    }
    float constant = of.mean ? -rstd * means[0] : 0.0f, slope = -rstd * rstd * means[1];

    over_packs<V, P, true>(mine, [&](int p, int column) {
      float g[V], d[V], w[V];
      widen(grad[p], g), widen(total[p], d);
      load<V>(weight + column, w);
#pragma unroll
      for (int i = 0; i < V; i++) g[i] = g[i] * w[i] * rstd + constant + (d[i] - mean) * slope;
      if constexpr (kAdd) {
        if (of.grad_total) {
          widen(stream[p], d);
#pragma unroll
          for (int i = 0; i < V; i++) g[i] += d[i];
        }
      }
      store<V>(of.grad_residual + start + column, g);
      if constexpr (kAdd) {
        drop<V>(of.dropout, key, start + column, g);
        if (of.grad_x) store<V>(of.grad_x + start + column, g);
#pragma unroll
        for (int i = 0; i < V; i++) of_bias[p][i] += g[i];
      }
    });
  }

  int sums = 1 + (of.mean ? 1 : 0) + (of.bias ? 1 : 0);
  float* to = of.parts + blockIdx.x * sums * of.columns;
  leave(of_weight, left, to, first, of.columns);
  if (of.mean) leave(of_norm_bias, left, to += of.columns, first, of.columns);
  if constexpr (kAdd)
    if (of.bias) leave(of_bias, left, to += of.columns, first, of.columns);
}

// Threads that hold a row, at `elements` each: whole warps.
inline int64_t threads_of(int64_t columns, int64_t elements) {
  return divide_up(divide_up(columns, elements), kWarp) * kWarp;
}

inline dim3 block_of(int64_t threads, int64_t most) {
  int64_t rows = threads < most ? most / threads : 1;
  return dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
}

// Calls `work` with the formats of the stream and of the weights, which are not float16 and
// bfloat16 at once.
template <typename Work>
int with_formats(int64_t stream, int64_t weights, Work work) {
  return with_format(stream, [&](auto s) {
    return with_format(weights, [&](auto w) {
      using S = typename decltype(s)::type;
      using W = typename decltype(w)::type;
      if constexpr (sizeof(S) == 2 && sizeof(W) == 2 && !kSame<S, W>)
        return kUnknownFormat;
      else
        return work(s, w);
    });
  });
}

template <bool kAdd, typename S, typename W>
int forward(const Forward<S, W>& of, Stream stream) {
  constexpr int V = kPack<S, W>;
  constexpr int64_t kShort = 128;   // threads of a block of short rows
  constexpr int64_t kUnpacked = 8;  // elements of a row without packs that make a thread worth it
  using Wider = typename decltype(wider<S, W>())::type;
  bool packs = fits<Wider>(of.columns, of.stream, of.x, of.bias, of.total, of.weight, of.norm_bias,
                           of.y);
  int64_t threads = threads_of(of.columns, packs ? kForwardElements : kUnpacked);
  bool held = packs && threads <= kForwardThreads;
  dim3 block = block_of(threads < kForwardThreads ? threads : kForwardThreads, kShort);
  dim3 grid(static_cast<unsigned>(divide_up(of.rows, block.y)));
  auto kernel = held    ? normalise<S, W, V, true, kAdd>
                : packs ? normalise<S, W, V, false, kAdd>
                        : normalise<S, W, 1, false, kAdd>;
  return launch(kernel, grid, block, 0, stream, of);
}

template <bool kAdd, int V, typename S, typename W>
int backward_in(Backward<S, W> of, float* means, int64_t blocks, Stream stream) {
  constexpr int64_t kThreads = kBackwardThreads<V, kAdd>;
  constexpr int64_t kElements = kBackwardElements<V, kAdd>;
  int64_t threads = threads_of(of.columns, kElements), tiles = 1;
  if (threads > kThreads) {
    int error = launch(average<S, W, V>, dim3(static_cast<unsigned>(of.rows)),
                       dim3(kAverageThreads), 0, stream, of, means);
    if (error) return error;
    of.means = means;
    threads = 128;
    tiles = divide_up(of.columns, threads * kElements);
  }
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
  dim3 block = of.means ? dim3(static_cast<unsigned>(threads)) : block_of(threads, kThreads);
  return launch(differentiate<S, W, V, kAdd>, grid, block, 0, stream, of);
}

template <bool kAdd, typename S, typename W>
int backward(const Backward<S, W>& of, float* means, int64_t blocks, Stream stream) {
  using Wider = typename decltype(wider<S, W>())::type;
  bool packs = fits<Wider>(of.columns, of.grad, of.grad_total, of.total, of.weight,
                           of.grad_residual, of.grad_x);
  return packs ? backward_in<kAdd, kPack<S, W>>(of, means, blocks, stream)
               : backward_in<kAdd, 1>(of, means, blocks, stream);
}

}  // namespace
}  // namespace megatron

// Without `residual`, `x` of the stream's format is normalised. `mean` is null in an RMSNorm.
EXPORT int norm_forward(const void* x, const void* bias, const void* residual, void* total,
                        const void* weight, const void* norm_bias, void* y, void* mean, void* rstd,
                        const void* key, int64_t draw, int64_t threshold, float scale,
                        float epsilon, int64_t rows, int64_t columns, int64_t stream_format,
                        int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_formats(stream_format, format, [&](auto s, auto w) {
    using S = typename decltype(s)::type;
    using W = typename decltype(w)::type;
    Forward<S, W> of = {static_cast<const S*>(residual ? residual : x),
                        static_cast<const W*>(residual ? x : nullptr),
                        static_cast<const W*>(bias),
                        static_cast<S*>(total),
                        static_cast<const W*>(weight),
                        static_cast<const W*>(norm_bias),
                        static_cast<W*>(y),
                        static_cast<float*>(mean),
                        static_cast<float*>(rstd),
                        {static_cast<const int64_t*>(key), static_cast<uint64_t>(draw),
                         static_cast<uint32_t>(threshold), scale},
                        epsilon,
                        rows,
                        columns};
    return residual ? forward<true>(of, stream) : forward<false>(of, stream);
  });
}

// `parts` is float [blocks, sums, columns], `means` float [rows, 2]. `added` says that x was added
// to the stream before, and `bias` that it had one.
EXPORT int norm_backward(const void* grad, const void* grad_total, const void* total,
                         const void* mean, const void* rstd, const void* weight,
                         void* grad_residual, void* grad_x, void* parts, void* means,
                         const void* key, int64_t draw, int64_t threshold, float scale,
                         int64_t added, int64_t bias, int64_t blocks, int64_t rows,
                         int64_t columns, int64_t stream_format, int64_t format,
                         megatron::Stream stream) {
  using namespace megatron;
  return with_formats(stream_format, format, [&](auto s, auto w) {
    using S = typename decltype(s)::type;
    using W = typename decltype(w)::type;
    Backward<S, W> of = {static_cast<const W*>(grad),
                         static_cast<const S*>(grad_total),
                         static_cast<const S*>(total),
                         static_cast<const float*>(mean),
                         static_cast<const float*>(rstd),
                         static_cast<const W*>(weight),
                         static_cast<S*>(grad_residual),
                         static_cast<W*>(grad_x),
                         static_cast<float*>(parts),
                         nullptr,
                         bias != 0,
                         {static_cast<const int64_t*>(key), static_cast<uint64_t>(draw),
                          static_cast<uint32_t>(threshold), scale},
                         rows,
                         columns};
    return added ? backward<true>(of, static_cast<float*>(means), blocks, stream)
                 : backward<false>(of, static_cast<float*>(means), blocks, stream);
  });
}
