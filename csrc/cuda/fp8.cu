// Factors of products in 8 bits: x / scale, rounded, with a scale that brings the largest magnitude
// of x to the largest number of the format.
//
//   scale      of a tensor, from its largest magnitude or from that of earlier steps
//   cast       x [n, k] to 8 bits, as it lies, transposed, or both, in one pass over x
//   transpose  of what is in 8 bits already
//
// Products in 8 bits want both factors along the summed dimension, so that the backward pass needs
// x^T beside x. Its rows are as long as n rounded up to 16, with zeros at the end. A tile goes
// through shared memory, whose places are exchanged so that neither its rows nor its columns meet
// in one bank.

#include "dispatch.cuh"
#include "fp8.cuh"
#include "reduce.cuh"

namespace megatron {
namespace {

// Of magnitudes as bits, whose order is that of the numbers, with NaN above all.
struct Largest {
  static __device__ __forceinline__ uint32_t of(uint32_t a, uint32_t b) { return a > b ? a : b; }
};

constexpr int kThreads = 256;
constexpr int kUnrolled = 4;
constexpr int64_t kMostParts = 8 * 132;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    largest_magnitudes(const T* x, const float* recent, uint32_t* parts, int64_t count) {
  constexpr int V = kFull<T>;
  __shared__ uint32_t scratch[kThreads / kWarp];
  if (recent && *recent > 0.0f) return;
  int64_t packs = count / V, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t largest = 0;
  int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; pack + (kUnrolled - 1) * stride < packs; pack += kUnrolled * stride) {
    float in[kUnrolled][V];
#pragma unroll
    for (int u = 0; u < kUnrolled; u++) load<V>(x + (pack + u * stride) * V, in[u]);
#pragma unroll
    for (int u = 0; u < kUnrolled; u++)
#pragma unroll
      for (int i = 0; i < V; i++) largest = Largest::of(largest, bits_of(in[u][i]) & kMagnitude);
  }
  for (; pack < packs; pack += stride) {
    float in[V];
    load<V>(x + pack * V, in);
#pragma unroll
    for (int i = 0; i < V; i++) largest = Largest::of(largest, bits_of(in[i]) & kMagnitude);
  }
  largest = over_block<Largest, kThreads>(largest, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = largest;
}

constexpr int kGathering = 512;  // threads of the one block that gathers the parts

__device__ __forceinline__ uint32_t gathered(const uint32_t* parts, int64_t count,
                                             uint32_t* scratch) {
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < count; i += kGathering)
    largest = Largest::of(largest, parts[i]);
  return over_block<Largest, kGathering>(largest, scratch);
}

// Far below what numbers in training are, and its quotient with any format's largest still normal.
constexpr float kSmallest = 1.262177448e-29f;  // 2^-96

__global__ void __launch_bounds__(kGathering)
    make_scale(const uint32_t* parts, const float* recent, float* scale, int64_t count,
               float limit) {
  __shared__ uint32_t scratch[kGathering / kWarp];
  float largest = recent ? *recent : 0.0f;
  if (!(largest > 0.0f)) largest = float_of(gathered(parts, count, scratch));
  if (threadIdx.x == 0) *scale = (largest < kSmallest ? kSmallest : largest) / limit;
}

// The largest of what was there and the parts.
__global__ void __launch_bounds__(kGathering)
    keep_largest(const uint32_t* parts, float* kept, int64_t count) {
  __shared__ uint32_t scratch[kGathering / kWarp];
  uint32_t largest = gathered(parts, count, scratch);
  if (threadIdx.x == 0) *kept = float_of(Largest::of(largest, bits_of(*kept)));
}

constexpr int kChunk = 16;  // elements in 8 bits of one access
constexpr int kTileRows = 64;
constexpr int kTileColumns = 128;
constexpr int kInRow = kTileColumns / kChunk;
constexpr int kTileThreads = 128;
constexpr int kAtOnce = kTileThreads / kInRow;     // rows of a tile that its threads take together
constexpr int kPasses = kTileRows / kAtOnce;       // until they have taken all
constexpr int kRowChunks = kTileRows / kChunk;     // chunks along a transposed row

struct alignas(16) Chunk {
  uint32_t words[4];
};

using Tile = Chunk[kTileRows][kInRow];

// Where the tile has a chunk. A warp that writes covers four whole rows; one that reads takes a
// word of 8 in a row, from 4 rows that are 16 apart: these lie in different banks.
__device__ __forceinline__ int place(int row, int chunk) {
  return chunk ^ (row / kChunk % kRowChunks << 1);
}

// Four rows of four bytes to four columns.
__device__ __forceinline__ void turn(const uint32_t (&rows)[4], uint32_t (&columns)[4]) {
  uint32_t top_left = __byte_perm(rows[0], rows[1], 0x5140);
  uint32_t bottom_left = __byte_perm(rows[2], rows[3], 0x5140);
  uint32_t top_right = __byte_perm(rows[0], rows[1], 0x7362);
  uint32_t bottom_right = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(top_left, bottom_left, 0x5410);
  columns[1] = __byte_perm(top_left, bottom_left, 0x7632);
  columns[2] = __byte_perm(top_right, bottom_right, 0x5410);
  columns[3] = __byte_perm(top_right, bottom_right, 0x7632);
}

// Each thread turns 16 rows of 4 columns of the tile and writes them as 4 chunks.
__device__ __forceinline__ void store_transposed(const Tile& tile, uint8_t* to, int64_t first_row,
                                                 int64_t first_column, int64_t columns,
                                                 int64_t padded) {
  int group = threadIdx.x % kRowChunks, quad = threadIdx.x / kRowChunks;
  int64_t row = first_row + group * kChunk, column = first_column + quad * 4;
  if (row >= padded || column >= columns) return;
  Chunk out[4];
#pragma unroll
  for (int part = 0; part < 4; part++) {
    uint32_t in[4], turned[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int at = group * kChunk + part * 4 + i;
      in[i] = tile[at][place(at, quad / 4)].words[quad % 4];
    }
    turn(in, turned);
#pragma unroll
    for (int i = 0; i < 4; i++) out[i].words[part] = turned[i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    *reinterpret_cast<Chunk*>(to + (column + i) * padded + row) = out[i];
}

// 16 elements from `from` on, or zeros.
template <typename T>
__device__ __forceinline__ void load_chunk(const T* from, bool there, float (&to)[kChunk]) {
  constexpr int V = kFull<T>;
#pragma unroll
  for (int part = 0; part < kChunk / V; part++) {
    float in[V] = {};
    if (there) load<V>(from + part * V, in);
#pragma unroll
    for (int i = 0; i < V; i++) to[part * V + i] = in[i];
  }
}

template <typename F>
__device__ __forceinline__ Chunk narrow(const float (&in)[kChunk], float factor) {
  Chunk out;
#pragma unroll
  for (int word = 0; word < 4; word++) {
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scaled[i] = nan_unless_finite(in[word * 4 + i] * factor);
    out.words[word] = F::pair(scaled[0], scaled[1]) | F::pair(scaled[2], scaled[3]) << 16;
  }
  return out;
}

// A block has a tile. `values`, `transposed` and `parts`, the tiles' largest magnitudes before they
// were scaled, are written where they are given.
template <typename F, typename T>
__global__ void __launch_bounds__(kTileThreads)
    cast_tile(const T* x, const float* scale, uint8_t* values, uint8_t* transposed, uint32_t* parts,
              int64_t rows, int64_t columns, int64_t padded, uint32_t tiles_in_row) {
  constexpr int kTogether = 2;  // passes whose loads are under way at once
  __shared__ Tile tile;
  __shared__ uint32_t scratch[kTileThreads / kWarp];
  int64_t first_row = static_cast<int64_t>(blockIdx.x / tiles_in_row) * kTileRows;
  int64_t first_column = static_cast<int64_t>(blockIdx.x % tiles_in_row) * kTileColumns;
  int chunk = threadIdx.x % kInRow;
  int64_t column = first_column + chunk * kChunk;
  float factor = 1.0f / *scale;
  uint32_t largest = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; pass += kTogether) {
    float in[kTogether][kChunk];
#pragma unroll
    for (int p = 0; p < kTogether; p++) {
      int64_t row = first_row + (pass + p) * kAtOnce + threadIdx.x / kInRow;
      load_chunk(x + row * columns + column, row < rows && column < columns, in[p]);
    }
#pragma unroll
    for (int p = 0; p < kTogether; p++) {
      int in_tile = (pass + p) * kAtOnce + threadIdx.x / kInRow;
      int64_t row = first_row + in_tile;
      Chunk out = narrow<F>(in[p], factor);
      if (values && row < rows && column < columns)
        *reinterpret_cast<Chunk*>(values + row * columns + column) = out;
      if (transposed) tile[in_tile][place(in_tile, chunk)] = out;
      if (parts)
#pragma unroll
        for (int i = 0; i < kChunk; i++)
          largest = Largest::of(largest, bits_of(in[p][i]) & kMagnitude);
    }
  }
  if (parts) {
    largest = over_block<Largest, kTileThreads>(largest, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = largest;
  }
  if (!transposed) return;
  __syncthreads();
  store_transposed(tile, transposed, first_row, first_column, columns, padded);
}

__global__ void __launch_bounds__(kTileThreads)
    transpose_tile(const uint8_t* x, uint8_t* transposed, int64_t rows, int64_t columns,
                   int64_t padded, uint32_t tiles_in_row) {
  __shared__ Tile tile;
  int64_t first_row = static_cast<int64_t>(blockIdx.x / tiles_in_row) * kTileRows;
  int64_t first_column = static_cast<int64_t>(blockIdx.x % tiles_in_row) * kTileColumns;
  int chunk = threadIdx.x % kInRow;
  int64_t column = first_column + chunk * kChunk;
  Chunk in[kPasses] = {};
#pragma unroll
  for (int pass = 0; pass < kPasses; pass++) {
    int64_t row = first_row + pass * kAtOnce + threadIdx.x / kInRow;
    if (row < rows && column < columns)
      in[pass] = *reinterpret_cast<const Chunk*>(x + row * columns + column);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; pass++) {
    int in_tile = pass * kAtOnce + threadIdx.x / kInRow;
    tile[in_tile][place(in_tile, chunk)] = in[pass];
  }
  __syncthreads();
  store_transposed(tile, transposed, first_row, first_column, columns, padded);
}

uint32_t tiles_in_row(int64_t columns) {
  return static_cast<uint32_t>(divide_up(columns, kTileColumns));
}

int64_t tiles(int64_t rows, int64_t columns) {
  return divide_up(rows, kTileRows) * tiles_in_row(columns);
}

}  // namespace
}  // namespace megatron

EXPORT int64_t fp8_scale_parts(int64_t count) {
  using namespace megatron;
  int64_t wanted = divide_up(count, kThreads * kUnrolled * kFull<float>);
  return wanted < kMostParts ? wanted : kMostParts;
}

EXPORT int64_t fp8_cast_parts(int64_t rows, int64_t columns) {
  return megatron::tiles(rows, columns);
}

// Scale of `count` elements, a multiple of 16 at an address that is one, for a format that reaches
// up to `limit`: from `recent` where it is given and positive, else from x. `parts` are
// fp8_scale_parts(count) words for between.
EXPORT int fp8_scale(const void* x, const void* recent, void* parts, void* scale, int64_t count,
                     float limit, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  int64_t blocks = fp8_scale_parts(count);
  auto* own = static_cast<uint32_t*>(parts);
  auto* known = static_cast<const float*>(recent);
  int error = with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch(largest_magnitudes<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                  stream, static_cast<const T*>(x), known, own, count);
  });
  if (error) return error;
  return launch(make_scale, dim3(1), dim3(kGathering), 0, stream,
                static_cast<const uint32_t*>(own), known, static_cast<float*>(scale), blocks,
                limit);
}

// x [rows, columns] / scale to `values`, as it lies, and `transposed` [columns, padded]; either may
// be null. Columns are a multiple of 16, and padded is the rows rounded up to one. With `kept`, the
// largest magnitude of x is kept there if it exceeds what is; `parts` are fp8_cast_parts words for
// between, or null as `kept`.
EXPORT int fp8_cast(const void* x, const void* scale, void* values, void* transposed, void* parts,
                    void* kept, int64_t rows, int64_t columns, int64_t padded, int64_t e5m2,
                    int64_t format, megatron::Stream stream) {
  using namespace megatron;
  int64_t blocks = tiles(rows, columns);
  auto* own = static_cast<uint32_t*>(parts);
  int error = with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    auto kernel = e5m2 ? cast_tile<E5M2, T> : cast_tile<E4M3, T>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), 0, stream,
                  static_cast<const T*>(x), static_cast<const float*>(scale),
                  static_cast<uint8_t*>(values), static_cast<uint8_t*>(transposed), own, rows,
                  columns, padded, tiles_in_row(columns));
  });
  if (error || !kept) return error;
  return launch(keep_largest, dim3(1), dim3(kGathering), 0, stream,
                static_cast<const uint32_t*>(own), static_cast<float*>(kept), blocks);
}

// As fp8_cast's transposed result, of x that is in 8 bits.
EXPORT int fp8_transpose(const void* x, void* transposed, int64_t rows, int64_t columns,
                         int64_t padded, megatron::Stream stream) {
  using namespace megatron;
  return launch(transpose_tile, dim3(static_cast<unsigned>(tiles(rows, columns))),
                dim3(kTileThreads), 0, stream, static_cast<const uint8_t*>(x),
                static_cast<uint8_t*>(transposed), rows, columns, padded, tiles_in_row(columns));
}
