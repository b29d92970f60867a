// Cross entropy of rows of logits z [n, v], of which the first `real` columns count, and targets y:
//
//   m = max_v z_v,  s = sum_v exp(z_v - m),  loss = log(s) - (z_y - m)
//   d loss / d z_v = exp(z_v - m) / s - [v = y], times the gradient of the row's loss
//
// A pass over the logits each. Forward, a thread keeps the maximum of what it has seen and the sum
// of exponentials under it, and rescales the sum when the maximum grows (Milakov and Gimelshein,
// Online normalizer calculation for softmax, arXiv 1805.02867); the block then joins its threads'.
// With the vocabulary split over ranks, these columns begin at `start` of the vocabulary, and what
// remains of a row is its m, its s and its z_y, or 0 where the target is another rank's.
//
// A row has a block to itself. It may begin anywhere: the elements before its first address that
// is divisible by 16 and those behind the last whole pack are taken one by one.

#include "dispatch.cuh"
#include "reduce.cuh"

namespace megatron {
namespace {

constexpr int kThreads = 512;
constexpr int kFlight = 4;  // packs that a thread has asked for before it looks at the first

// No maximum is below this, and times log2(e) it is a float still.
constexpr float kLowest = -1e38f;
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float power_of_two(float x) {
#if defined(MEGATRON_EMULATED)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// exp(z - maximum) of logits z. A sum of them is turned into one under another maximum by `from`,
// and into one under the very maximum by `correction`.
struct Exact {
  float maximum;

  __device__ __forceinline__ explicit Exact(float maximum) : maximum(maximum) {}
  __device__ __forceinline__ float exponential(float z) const { return expf(z - maximum); }
  __device__ __forceinline__ float from(Exact other) const { return expf(other.maximum - maximum); }
  __device__ __forceinline__ float correction() const { return 1.0f; }
};

// For half precision, of which twice as many logits arrive in a second: two instructions for each,
// 2^(z log2(e) - shift). The shift has been rounded, which is the same factor in all of a row's.
struct Quick {
  float maximum, shift;

  __device__ __forceinline__ explicit Quick(float maximum) : maximum(maximum) {
    // Not a product that the compiler may do with a sum in one, and then without rounding.
    shift = __fmul_rn(maximum, kLog2E);
  }
  __device__ __forceinline__ float exponential(float z) const {
    return power_of_two(fmaf(z, kLog2E, -shift));
  }
  __device__ __forceinline__ float from(Quick other) const {
    return power_of_two(other.shift - shift);
  }
  __device__ __forceinline__ float correction() const {
    return power_of_two(fmaf(maximum, -kLog2E, shift));
  }
};

template <typename T>
struct Chosen {
  using type = Quick;
};
template <>
struct Chosen<float> {
  using type = Exact;
};
template <typename T>
using Under = typename Chosen<T>::type;

// A row in packs at addresses that are divisible by their size, and what lies around these.
template <typename T, int V>
struct Cut {
  int head, packs, edges;

  __device__ __forceinline__ Cut(const T* row, int columns) {
    int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Pack<T, V>) / sizeof(T));
    head = past ? V - past : 0;
    if (head > columns) head = columns;
    packs = (columns - head) / V;
    edges = columns - packs * V;  // fewer than 2 V
  }
  // The first column of a pack, and the column of an element that is in none.
  __device__ __forceinline__ int pack(int i) const { return head + i * V; }
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : packs * V + i; }
};

// Where a row's target lies among this rank's columns; -1 where it does not.
__device__ __forceinline__ int own(int64_t target, int64_t start, int real) {
  int64_t column = target - start;
  return column >= 0 && column < real ? static_cast<int>(column) : -1;
}

// `statistics` are the rows' m, then their s, then their z_y. The loss is right where no other rank
// has columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    measure(const T* logits, int64_t stride, const int64_t* targets, float* loss, float* statistics,
            int64_t start, int real) {
  constexpr int V = kFull<T>;
  __shared__ float scratch[kThreads / kWarp];
  int64_t rows = gridDim.x, n = blockIdx.x;
  const T* row = logits + n * stride;
  int target = own(targets[n], start, real);
  float at_target = target < 0 ? 0.0f : to_float(row[target]);

  Cut<T, V> cut(row, real);
  int thread = static_cast<int>(threadIdx.x);
  Under<T> under(kLowest);
  float total = 0.0f;
  if (thread < cut.edges) {
    float z = to_float(row[cut.edge(thread)]);
    under = Under<T>(fmaxf(kLowest, z));
    total = under.exponential(z);
  }
  for (int first = thread; first < cut.packs; first += kThreads * kFlight) {
    float z[kFlight][V], sums[kFlight], top = under.maximum;
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      int pack = first + k * kThreads;
#pragma unroll
      for (int i = 0; i < V; i++) z[k][i] = kLowest;
      if (pack < cut.packs) load<V>(row + cut.pack(pack), z[k]);
    }
#pragma unroll
    for (int k = 0; k < kFlight; k++)
#pragma unroll
      for (int i = 0; i < V; i++) top = fmaxf(top, z[k][i]);
    Under<T> now(top);
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      sums[k] = 0.0f;
      if (first + k * kThreads < cut.packs) {
#pragma unroll
        for (int i = 0; i < V; i++) sums[k] += now.exponential(z[k][i]);
      }
    }
    total *= now.from(under);
#pragma unroll
    for (int k = 0; k < kFlight; k++) total += sums[k];
    under = now;
  }

  Under<T> whole(over_block<Max, kThreads>(under.maximum, scratch));
  total = over_block<Sum, kThreads>(total * whole.from(under), scratch) * whole.correction();
  if (thread == 0) {
    loss[n] = logf(total) - (at_target - whole.maximum);
    statistics[n] = whole.maximum;
    statistics[rows + n] = total;
    statistics[2 * rows + n] = at_target;
  }
}

// Writes all `columns` of `to`, which may be the logits: zeros from `real` on, and in rows whose
// loss has gradient 0, which are not read.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    differentiate(const T* logits, int64_t stride, const int64_t* targets, const float* maxima,
                  const float* totals, const float* grads, int64_t grad_stride, T* to,
                  int64_t to_stride, int64_t start, int real, int columns) {
  int64_t n = blockIdx.x;
  const T* row = logits + n * stride;
  T* own_row = to + n * to_stride;
  Under<T> under(maxima[n]);
  float grad = grads[n * grad_stride], scale = grad / totals[n] * under.correction();
  int target = own(targets[n], start, real);
  bool counts = grad != 0.0f;
  auto gradient = [&](float z, int column) {
    float value = under.exponential(z) * scale;
    if (column == target) value -= grad;
    return counts && column < real ? value : 0.0f;
  };

  Cut<T, V> cut(own_row, columns);
  int thread = static_cast<int>(threadIdx.x);
  if (thread < cut.edges) {
    int column = cut.edge(thread);
    own_row[column] = Format<T>::from(gradient(counts ? to_float(row[column]) : 0.0f, column));
  }
  for (int first = thread; first < cut.packs; first += kThreads * kFlight) {
    float z[kFlight][V];
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      int pack = first + k * kThreads;
#pragma unroll
      for (int i = 0; i < V; i++) z[k][i] = 0.0f;
      if (counts && pack < cut.packs) load<V>(row + cut.pack(pack), z[k]);
    }
#pragma unroll
    for (int k = 0; k < kFlight; k++) {
      int pack = first + k * kThreads;
      if (pack < cut.packs) {
#pragma unroll
        for (int i = 0; i < V; i++) z[k][i] = gradient(z[k][i], cut.pack(pack) + i);
        store<V>(own_row + cut.pack(pack), z[k]);
      }
    }
  }
}

}  // namespace
}  // namespace megatron

// `loss` is float [rows] and `statistics` float [3, rows].
EXPORT int cross_entropy_forward(const void* logits, const void* targets, void* loss,
                                 void* statistics, int64_t rows, int64_t stride, int64_t start,
                                 int64_t real, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch(measure<T>, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(logits), stride, static_cast<const int64_t*>(targets),
                  static_cast<float*>(loss), static_cast<float*>(statistics), start, real);
  });
}

EXPORT int cross_entropy_backward(const void* logits, const void* targets, const void* maxima,
                                  const void* totals, const void* grads, void* to, int64_t rows,
                                  int64_t columns, int64_t stride, int64_t grad_stride,
                                  int64_t to_stride, int64_t start, int64_t real, int64_t format,
                                  megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    // Whether the packs of a row lie alike in both.
    uintptr_t apart = reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(to);
    bool alike = apart % 16 == 0 && (stride - to_stride) % kFull<T> == 0;
    auto kernel = alike ? differentiate<T, kFull<T>> : differentiate<T, 1>;
    return launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(logits), stride, static_cast<const int64_t*>(targets),
                  static_cast<const float*>(maxima), static_cast<const float*>(totals),
                  static_cast<const float*>(grads), grad_stride, static_cast<T*>(to), to_stride,
                  start, real, columns);
  });
}
