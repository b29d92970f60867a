// The softmax of attention scores, scaled, over the keys that a query may see.
//
//   forward    y  = softmax(scale x), zero where a key is hidden      [b, n, s, z] -> [b, n, s, z]
//   backward   dx = scale y (dy - sum(dy y)), the sum over a row
//
// A mask hides keys, or their being ahead of the query, or both; what is ahead is neither read nor
// computed with. A query that sees no key has NaN for weights. A warp or a block holds a row in
// registers, a longer row in shared memory, and reads one twice that is too long for that.

#include "dispatch.cuh"
#include "reduce.cuh"

namespace megatron {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// The score of a key that is not seen. There is no name for it that all compilers know.
__device__ __forceinline__ float hidden() { return -1.0f / 0.0f; }

struct Rows {
  unsigned count, queries, heads;
  int columns;
  bool causal;

  // The keys from here on are ahead of the row's query.
  __device__ __forceinline__ int limit(unsigned row) const {
    int seen = causal ? static_cast<int>(row % queries) + 1 : columns;
    return seen < columns ? seen : columns;
  }
};

// A mask that broadcasts to the scores: where a row's part of it begins is a sum of strides.
struct Mask {
  const uint8_t* seen;
  int64_t of_batch, of_head, of_query;

  __device__ __forceinline__ const uint8_t* of(unsigned row, const Rows& rows) const {
    if (!seen) return nullptr;
    unsigned above = row / rows.queries;
    return seen + of_query * (row % rows.queries) + of_head * (above % rows.heads) +
           of_batch * (above / rows.heads);
  }
};

// Some scores of a row as they lie in memory, so that many can be on their way at once.
template <typename T, int V>
struct Scores {
  Pack<T, V> x;
  Pack<uint8_t, V> seen;

  __device__ __forceinline__ void fetch_at(const T* row, const uint8_t* mask, int column,
                                           int limit) {
    x = {};
#pragma unroll
    for (int i = 0; i < V; i++) seen.values[i] = 1;
    if (column >= limit) return;
    x = fetch<V>(row + column);
    if (mask) seen = fetch<V>(mask + column);
  }

  // Chosen after the conversion, which is cheaper than a branch.
  __device__ __forceinline__ float at(int i, int column, int limit) const {
    float score = to_float(x.values[i]);
    bool shown = (column + i < limit) & (seen.values[i] != 0);
    return shown ? score : hidden();
  }
};

// A team of threads has a row: a warp, of which a block has several, or a whole block.
template <int kTeam>
constexpr int kBlock = kTeam == kWarp ? 256 : kTeam;

constexpr int kLongTeam = 512;

template <int kTeam>
__device__ __forceinline__ unsigned own_row() {
  if constexpr (kTeam == kWarp)
    return blockIdx.x * (kBlock<kTeam> / kWarp) + threadIdx.x / kWarp;
  else
    return blockIdx.x;
}

template <typename Operation, int kTeam>
__device__ __forceinline__ float over_team(float value) {
  if constexpr (kTeam == kWarp) {
    return over_warp<Operation>(value);
  } else {
    __shared__ float scratch[kTeam / kWarp];
    return over_block<Operation, kTeam>(value, scratch);
  }
}

// A row of up to kTeam x kPacks x V scores.
template <typename T, int V, int kTeam, int kPacks>
__global__ void __launch_bounds__(kBlock<kTeam>)
    softmax_held(const T* x, T* y, Rows rows, Mask mask, float scale) {
  unsigned row = own_row<kTeam>();
  if (row >= rows.count) return;
  int limit = rows.limit(row), first = threadIdx.x % kTeam * V;
  const uint8_t* seen = mask.of(row, rows);
  x += static_cast<int64_t>(row) * rows.columns;
  y += static_cast<int64_t>(row) * rows.columns;
  Scores<T, V> scores[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; p++) scores[p].fetch_at(x, seen, first + p * kTeam * V, limit);
  float values[kPacks][V], largest = Max::kNothing;
#pragma unroll
  for (int p = 0; p < kPacks; p++)
#pragma unroll
    for (int i = 0; i < V; i++) {
      values[p][i] = scores[p].at(i, first + p * kTeam * V, limit);
      largest = Max::of(largest, values[p][i]);
    }
  largest = over_team<Max, kTeam>(largest);
  // The difference first: it is exact where it matters, while the scaled scores are rounded.
  float factor = scale * kLog2E, sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; p++)
#pragma unroll
    for (int i = 0; i < V; i++) {
      values[p][i] = exp2f((values[p][i] - largest) * factor);
      sum += values[p][i];
    }
  float inverse = 1.0f / over_team<Sum, kTeam>(sum);
#pragma unroll
  for (int p = 0; p < kPacks; p++) {
    int column = first + p * kTeam * V;
    if (column >= rows.columns) break;
#pragma unroll
    for (int i = 0; i < V; i++) values[p][i] *= inverse;
    store<V>(y + column, values[p]);
  }
}

// A row of any length. Its scores are looked at twice, the second time in shared memory where each
// thread has kept there what it needs again. Until the block's largest score is known, the sum of a
// thread is relative to the largest of its own.
template <typename T, int V, bool kKept>
__global__ void __launch_bounds__(kLongTeam)
    softmax_long(const T* x, T* y, Rows rows, Mask mask, float scale) {
  DYNAMIC_SHARED(shared);
  T* kept = reinterpret_cast<T*>(shared);
  unsigned row = blockIdx.x;
  int limit = rows.limit(row), first = threadIdx.x * V;
  const uint8_t* seen = mask.of(row, rows);
  x += static_cast<int64_t>(row) * rows.columns;
  y += static_cast<int64_t>(row) * rows.columns;
  float factor = scale * kLog2E, own = Max::kNothing, sum = 0.0f;
#pragma unroll 4
  for (int column = first; column < limit; column += kLongTeam * V) {
    Scores<T, V> scores;
    scores.fetch_at(x, seen, column, limit);
    if (kKept) *reinterpret_cast<Pack<T, V>*>(kept + column) = scores.x;
    float before = own;
#pragma unroll
    for (int i = 0; i < V; i++) own = Max::of(own, scores.at(i, column, limit));
    sum *= exp2f((before - own) * factor);
#pragma unroll
    for (int i = 0; i < V; i++) sum += exp2f((scores.at(i, column, limit) - own) * factor);
  }
  float largest = over_team<Max, kLongTeam>(own);
  float inverse = 1.0f / over_team<Sum, kLongTeam>(sum * exp2f((own - largest) * factor));
#pragma unroll 4
  for (int column = first; column < rows.columns; column += kLongTeam * V) {
    Scores<T, V> scores;
    scores.fetch_at(kKept ? kept : x, seen, column, limit);
    float values[V];
#pragma unroll
    for (int i = 0; i < V; i++)
      values[i] = exp2f((scores.at(i, column, limit) - largest) * factor) * inverse;
    store<V>(y + column, values);
  }
}

template <typename T, int V, int kTeam, int kPacks>
__global__ void __launch_bounds__(kBlock<kTeam>)
    differentiate_held(const T* grad, const T* y, T* grad_x, Rows rows, float scale) {
  unsigned row = own_row<kTeam>();
  if (row >= rows.count) return;
  int limit = rows.limit(row), first = threadIdx.x % kTeam * V;
  grad += static_cast<int64_t>(row) * rows.columns;
  y += static_cast<int64_t>(row) * rows.columns;
  grad_x += static_cast<int64_t>(row) * rows.columns;
  // As they lie in memory: in half precision they take half of the registers.
  Pack<T, V> grads[kPacks], weights[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; p++) {
    int column = first + p * kTeam * V;
    grads[p] = weights[p] = {};
    if (column >= limit) continue;
    grads[p] = fetch<V>(grad + column);
    weights[p] = fetch<V>(y + column);
  }
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; p++)
#pragma unroll
    for (int i = 0; i < V; i++) {
      float product = to_float(grads[p].values[i]) * to_float(weights[p].values[i]);
      sum += first + p * kTeam * V + i < limit ? product : 0.0f;
    }
  sum = over_team<Sum, kTeam>(sum);
#pragma unroll
  for (int p = 0; p < kPacks; p++) {
    int column = first + p * kTeam * V;
    if (column >= rows.columns) break;
    float result[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
      float weight = scale * to_float(weights[p].values[i]);
      float value = weight * (to_float(grads[p].values[i]) - sum);
      result[i] = column + i < limit ? value : 0.0f;
    }
    store<V>(grad_x + column, result);
  }
}

template <typename T, int V, bool kKept>
__global__ void __launch_bounds__(kLongTeam)
    differentiate_long(const T* grad, const T* y, T* grad_x, Rows rows, float scale) {
  DYNAMIC_SHARED(shared);
  T* kept_grad = reinterpret_cast<T*>(shared);
  T* kept_y = kept_grad + rows.columns;
  unsigned row = blockIdx.x;
  int limit = rows.limit(row), first = threadIdx.x * V;
  grad += static_cast<int64_t>(row) * rows.columns;
  y += static_cast<int64_t>(row) * rows.columns;
  grad_x += static_cast<int64_t>(row) * rows.columns;
  float sum = 0.0f;
#pragma unroll 4
  for (int column = first; column < limit; column += kLongTeam * V) {
    Pack<T, V> g = fetch<V>(grad + column), weight = fetch<V>(y + column);
    if (kKept) {
      *reinterpret_cast<Pack<T, V>*>(kept_grad + column) = g;
      *reinterpret_cast<Pack<T, V>*>(kept_y + column) = weight;
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      float product = to_float(g.values[i]) * to_float(weight.values[i]);
      sum += column + i < limit ? product : 0.0f;
    }
  }
  sum = over_team<Sum, kLongTeam>(sum);
#pragma unroll 4
  for (int column = first; column < rows.columns; column += kLongTeam * V) {
    float result[V] = {};
    if (column < limit) {
      float g[V], weight[V];
      load<V>((kKept ? kept_grad : grad) + column, g);
      load<V>((kKept ? kept_y : y) + column, weight);
#pragma unroll
      for (int i = 0; i < V; i++) {
        float value = scale * weight[i] * (g[i] - sum);
        result[i] = column + i < limit ? value : 0.0f;
      }
    }
    store<V>(grad_x + column, result);
  }
}

template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

// Calls `work` with the threads of a team that holds a row in registers and how many elements each
// of them has, or calls `work_long`; returns what that returns.
template <typename Work, typename WorkLong>
int with_team(int64_t columns, Work work, WorkLong work_long) {
  if (columns <= 32 * 8) return work(Constant<32>(), Constant<8>());
  if (columns <= 32 * 16) return work(Constant<32>(), Constant<16>());
  if (columns <= 32 * 32) return work(Constant<32>(), Constant<32>());
  if (columns <= 128 * 16) return work(Constant<128>(), Constant<16>());
  if (columns <= 256 * 16) return work(Constant<256>(), Constant<16>());
  return work_long();
}

// Shared memory for a row, which every GPU can give a block; 0 where there is not enough. The least
// that there is are 64 KB, on Turing, and they have to hold the block's scratch, too.
constexpr int64_t kMostShared = 63 * 1024;

size_t kept_bytes(int64_t bytes) { return bytes <= kMostShared ? static_cast<size_t>(bytes) : 0; }

dim3 blocks(int64_t rows, int of_block) {
  return dim3(static_cast<unsigned>(divide_up(rows, of_block)));
}

constexpr int64_t kMost = 0x7fffffff;  // rows, and columns
constexpr int kTooLarge = 1;           // cudaErrorInvalidValue

}  // namespace
}  // namespace megatron

// x, y [batches, heads, queries, columns]; `seen`, or null, has a byte for each key that is not 0
// where it may be seen, with the strides `of_...` (0 where it broadcasts) and 1 along the columns.
EXPORT int scaled_softmax_forward(const void* x, const void* seen, void* y, int64_t batches,
                                  int64_t heads, int64_t queries, int64_t columns,
                                  int64_t of_batch, int64_t of_head, int64_t of_query,
                                  int64_t causal, float scale, int64_t format,
                                  megatron::Stream stream) {
  using namespace megatron;
  int64_t count = batches * heads * queries;
  if (count > kMost || columns > kMost) return kTooLarge;
  Rows rows{static_cast<unsigned>(count), static_cast<unsigned>(queries),
            static_cast<unsigned>(heads), static_cast<int>(columns), causal != 0};
  Mask mask{static_cast<const uint8_t*>(seen), of_batch, of_head, of_query};
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    bool packs = fits<T>(columns, x, y, seen);
    for (int64_t stride : {of_batch, of_head, of_query}) packs = packs && stride % kFull<T> == 0;
    auto start = [&](auto kernel, int block, int team, size_t shared) {
      return launch(kernel, blocks(count, block / team), dim3(block), shared, stream,
                    static_cast<const T*>(x), static_cast<T*>(y), rows, mask, scale);
    };
    auto held = [&](auto team, auto elements) {
      constexpr int kTeam = decltype(team)::value, kHeld = decltype(elements)::value;
      auto kernel = packs ? softmax_held<T, kFull<T>, kTeam, kHeld / kFull<T>>
                          : softmax_held<T, 1, kTeam, kHeld>;
      return start(kernel, kBlock<kTeam>, kTeam, 0);
    };
    return with_team(columns, held, [&] {
      size_t kept = kept_bytes(columns * sizeof(T));
      auto with_packs = kept ? softmax_long<T, kFull<T>, true> : softmax_long<T, kFull<T>, false>;
      auto without = kept ? softmax_long<T, 1, true> : softmax_long<T, 1, false>;
      auto kernel = packs ? with_packs : without;
      return start(kernel, kLongTeam, kLongTeam, kept);
    });
  });
}

// grad, y, grad_x [rows, columns], the rows being `queries` after `queries`.
EXPORT int scaled_softmax_backward(const void* grad, const void* y, void* grad_x, int64_t count,
                                   int64_t queries, int64_t columns, int64_t causal, float scale,
                                   int64_t format, megatron::Stream stream) {
  using namespace megatron;
  if (count > kMost || columns > kMost) return kTooLarge;
  Rows rows{static_cast<unsigned>(count), static_cast<unsigned>(queries), 1,
            static_cast<int>(columns), causal != 0};
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    bool packs = fits<T>(columns, grad, y, grad_x);
    auto start = [&](auto kernel, int block, int team, size_t shared) {
      return launch(kernel, blocks(count, block / team), dim3(block), shared, stream,
                    static_cast<const T*>(grad), static_cast<const T*>(y), static_cast<T*>(grad_x),
                    rows, scale);
    };
    auto held = [&](auto team, auto elements) {
      constexpr int kTeam = decltype(team)::value, kHeld = decltype(elements)::value;
      auto kernel = packs ? differentiate_held<T, kFull<T>, kTeam, kHeld / kFull<T>>
                          : differentiate_held<T, 1, kTeam, kHeld>;
      return start(kernel, kBlock<kTeam>, kTeam, 0);
    };
    return with_team(columns, held, [&] {
      size_t kept = kept_bytes(2 * columns * sizeof(T));
      auto with_packs =
          kept ? differentiate_long<T, kFull<T>, true> : differentiate_long<T, kFull<T>, false>;
      auto without = kept ? differentiate_long<T, 1, true> : differentiate_long<T, 1, false>;
      auto kernel = packs ? with_packs : without;
      return start(kernel, kLongTeam, kLongTeam, kept);
    });
  });
}
