// Operations on all elements of many tensors at once: the sum of their squares, division by a number
// that is on the device, and the addition of others to them.
//
// Squares are made in float32 and added up in float32 only within a pack of 16 bytes; all further
// sums are float64. A sum over any number of elements is then off by the rounding of single
// squares, and overflows where a single square nearly does. Blocks sum their tiles, and a second
// kernel the blocks, both in a fixed order.

#include "reduce.cuh"
#include "tiles.cuh"

namespace megatron {
namespace {

constexpr int kMostBlocks = 4096;  // of one launch, so that the second stage stays small
constexpr int kAdding = 512;       // threads of the second stage

// All loads of a thread's share of a tile come before the first use; what is beyond the end is 0.
template <int V, int kPacks, typename T>
__device__ __forceinline__ void load_tile(const T* from, const Tile& tile, float (&x)[kPacks][V]) {
#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    int64_t at = tile.begin + (i * kInBlock + threadIdx.x) * V;
#pragma unroll
    for (int j = 0; j < V; j++) x[i][j] = 0.0f;
    if (at < tile.end) load<V>(from + at, x[i]);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kInBlock)
    sum_squares(const Rows<1> rows, int tiles_of_block, double* parts) {
  __shared__ double scratch[kInBlock / kWarp];
  constexpr int kPacks = kTile / (kInBlock * V);
  double total = 0.0;
  int begin = static_cast<int>(blockIdx.x) * tiles_of_block;
  int end = begin + tiles_of_block < rows.tiles ? begin + tiles_of_block : rows.tiles;
  for (int number = begin; number < end; number++) {
    Tile tile = find(rows, number);
    float x[kPacks][V];
    load_tile<V, kPacks>(reinterpret_cast<const T*>(rows.address[tile.row][0]), tile, x);
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < V; j++) squares = fmaf(x[i][j], x[i][j], squares);
      total += squares;
    }
  }
  total = over_block<Sum, kInBlock>(total, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// One block.
__global__ void __launch_bounds__(kAdding) add_up(const double* parts, int64_t count, double* to) {
  __shared__ double scratch[kAdding / kWarp];
  double total = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kAdding) total += parts[i];
  total = over_block<Sum, kAdding>(total, scratch);
  if (threadIdx.x == 0) *to = total;
}

template <typename T, int V>
__global__ void __launch_bounds__(kInBlock) divide(const Rows<1> rows, const float* divisor) {
  constexpr int kPacks = kTile / (kInBlock * V);
  Tile tile = find(rows, static_cast<int>(blockIdx.x));
  T* values = reinterpret_cast<T*>(rows.address[tile.row][0]);
  float by = *divisor;
  float x[kPacks][V];
  load_tile<V, kPacks>(values, tile, x);
#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    int64_t at = tile.begin + (i * kInBlock + threadIdx.x) * V;
#pragma unroll
    for (int j = 0; j < V; j++) x[i][j] = x[i][j] / by;
    if (at < tile.end) store<V>(values + at, x[i]);
  }
}

// Where the sums of each row begin among all, in elements.
struct Starts {
  int64_t of[kTogether];
};

// Packs of V sums, of at most 16 bytes; those of what is added to them may be shorter.
template <typename T, int V>
__global__ void __launch_bounds__(kInBlock)
    add(const Rows<1> rows, const Starts starts, float* to) {
  constexpr int kPacks = kTile / (kInBlock * V);
  Tile tile = find(rows, static_cast<int>(blockIdx.x));
  float* sums = to + starts.of[tile.row];
  float x[kPacks][V], total[kPacks][V];
  load_tile<V, kPacks>(reinterpret_cast<const T*>(rows.address[tile.row][0]), tile, x);
  load_tile<V, kPacks>(sums, tile, total);
#pragma unroll
  for (int i = 0; i < kPacks; i++) {
    int64_t at = tile.begin + (i * kInBlock + threadIdx.x) * V;
#pragma unroll
    for (int j = 0; j < V; j++) total[i][j] += x[i][j];
    if (at < tile.end) store<V>(sums + at, total[i]);
  }
}

}  // namespace
}  // namespace megatron

// `to` is a double, `parts` are multi_tensor_parts(count) of them, `table` is the host's
// (tiles.cuh).
EXPORT int multi_tensor_squares(void* to, void* parts, const void* table, int64_t count,
                                int64_t format, megatron::Stream stream) {
  using namespace megatron;
  double* own = static_cast<double*>(parts);
  int64_t made = 0;
  int error = with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return together<1>(table, count, [&](const Rows<1>& rows, int64_t) {
      auto kernel = all_fit<kFull<T>>(rows) ? sum_squares<T, kFull<T>> : sum_squares<T, 1>;
      int tiles_of_block = static_cast<int>(divide_up(rows.tiles, kMostBlocks));
      int64_t blocks = divide_up(rows.tiles, tiles_of_block);
      double* to_blocks = own + made;
      made += blocks;
      return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kInBlock), 0, stream, rows,
                    tiles_of_block, to_blocks);
    });
  });
  if (error) return error;
  return launch(add_up, dim3(1), dim3(kAdding), 0, stream, own, made, static_cast<double*>(to));
}

EXPORT int64_t multi_tensor_parts(int64_t count) {
  return megatron::divide_up(count, megatron::kTogether) * megatron::kMostBlocks;
}

// In place. `divisor` is a float on the device.
EXPORT int multi_tensor_divide(const void* divisor, const void* table, int64_t count,
                               int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return together<1>(table, count, [&](const Rows<1>& rows, int64_t) {
      auto kernel = all_fit<kFull<T>>(rows) ? divide<T, kFull<T>> : divide<T, 1>;
      return launch(kernel, dim3(static_cast<unsigned>(rows.tiles)), dim3(kInBlock), 0, stream,
                    rows, static_cast<const float*>(divisor));
    });
  });
}

// Adds in place: row i of `table` to the float32 numbers at `to` from the one on that `starts`, i64
// on the host, says. No two rows meet.
EXPORT int multi_tensor_add(void* to, const void* starts, const void* table, int64_t count,
                            int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return together<1>(table, count, [&](const Rows<1>& rows, int64_t before) {
      constexpr int kPack = kFull<float>;
      Starts own = {};
      bool packs = all_fit<kPack>(rows) && reinterpret_cast<uintptr_t>(to) % 16 == 0;
      for (int row = 0; row < rows.count; row++) {
        own.of[row] = static_cast<const int64_t*>(starts)[before + row];
        packs = packs && own.of[row] % kPack == 0;
      }
      auto kernel = packs ? add<T, kPack> : add<T, 1>;
      return launch(kernel, dim3(static_cast<unsigned>(rows.tiles)), dim3(kInBlock), 0, stream,
                    rows, own, static_cast<float*>(to));
    });
  });
}
