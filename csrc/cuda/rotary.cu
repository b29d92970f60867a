// Rotary positions (arXiv 2104.09864) on heads as the product leaves them, in groups of queries
// with their key and their value: all heads of a group but the last, the value, are turned.
//
//   first, second -> first cos - second sin, second cos + first sin
//
// A head's channel i is the first of a pair whose second is channel half + i, for i < half; the
// channels from 2 half on are copied, and so is the value. The backward pass turns back.

#include "dispatch.cuh"

namespace megatron {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 2;  // units of a thread that are loaded at once
constexpr int kTile = kThreads * kFlight;

// A row are the heads that share their angles: those of a position, of a sample or of all. A unit
// is what a thread turns or copies at once, two packs of pairs or one pack of other channels.
struct Heads {
  int64_t units;      // of all rows
  uint32_t in_row;    // units of a row
  uint32_t in_head;   // units of a head
  uint32_t row;       // heads of a row
  uint32_t group;     // heads of a group
  uint32_t half, size;
};

// Where a unit lies: `first` and, of pairs, `second` in x and in y, `angle` in cos and sin.
struct Place {
  int64_t first, second, angle;
  bool exists, is_pair, turns;
};

// Unit `number` behind the block's first, which is unit `in_row` of row `row`.
template <int V>
__device__ __forceinline__ Place find(const Heads& heads, int64_t row, uint32_t in_row,
                                      uint32_t number) {
  uint32_t unit = in_row + number;
  row += unit / heads.in_row;
  unit %= heads.in_row;
  uint32_t head = unit / heads.in_head, column = unit % heads.in_head * V;
  int64_t start = (row * heads.row + head) * heads.size;
  Place place;
  place.is_pair = column < heads.half;
  place.turns = place.is_pair && head % heads.group != heads.group - 1;
  place.second = start + heads.half + column;
  place.first = place.is_pair ? start + column : place.second;
  place.angle = row * heads.half + (place.is_pair ? column : 0);
  return place;
}

// `sign` is 1, or -1 to turn back.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    turn(const T* x, const T* cos, const T* sin, T* y, float sign, Heads heads) {
  uint64_t begin = static_cast<uint64_t>(blockIdx.x) * kTile;
  int64_t row = static_cast<int64_t>(begin / heads.in_row);
  uint32_t in_row = static_cast<uint32_t>(begin % heads.in_row);
  // The last block's threads without a unit of their own load the last one again.
  uint64_t left = static_cast<uint64_t>(heads.units) - begin;
  uint32_t last = static_cast<uint32_t>(left < kTile ? left : kTile) - 1;
  float first[kFlight][V], second[kFlight][V], c[kFlight][V], s[kFlight][V];
  Place places[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; i++) {
    uint32_t number = threadIdx.x + i * kThreads;
    places[i] = find<V>(heads, row, in_row, min(number, last));
    places[i].exists = number <= last;
    load<V>(x + places[i].first, first[i]);
    load<V>(x + places[i].second, second[i]);
    load<V>(cos + places[i].angle, c[i]);
    load<V>(sin + places[i].angle, s[i]);
  }
#pragma unroll
  for (int i = 0; i < kFlight; i++) {
    if (!places[i].exists) return;
    if (places[i].turns) {
#pragma unroll
      for (int j = 0; j < V; j++) {
        float turned = first[i][j] * c[i][j] - second[i][j] * (sign * s[i][j]);
        second[i][j] = second[i][j] * c[i][j] + first[i][j] * (sign * s[i][j]);
        first[i][j] = turned;
      }
    }
    store<V>(y + places[i].first, first[i]);
    if (places[i].is_pair) store<V>(y + places[i].second, second[i]);
  }
}

// With packs of V elements, or of as many as the channels and addresses allow.
template <typename T, int V>
int start(const T* x, const T* cos, const T* sin, T* y, float sign, int64_t rows, Heads heads,
          Stream stream) {
  if constexpr (V > 1) {
    uintptr_t addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(cos) |
                          reinterpret_cast<uintptr_t>(sin) | reinterpret_cast<uintptr_t>(y);
    if (heads.half % V || heads.size % V || addresses % (V * sizeof(T)))
      return start<T, V / 2>(x, cos, sin, y, sign, rows, heads, stream);
  }
  int64_t in_head = (heads.size - heads.half) / V, in_row = in_head * heads.row;
  if (in_row >= int64_t{1} << 31) return kUnknownFormat;
  heads.in_head = static_cast<uint32_t>(in_head);
  heads.in_row = static_cast<uint32_t>(in_row);
  heads.units = in_row * rows;
  dim3 grid(static_cast<unsigned>(divide_up(heads.units, kTile)));
  return launch(turn<T, V>, grid, dim3(kThreads), 0, stream, x, cos, sin, y, sign, heads);
}

}  // namespace
}  // namespace megatron

// x and y are [rows, heads, size], cos and sin [rows, half].
EXPORT int rotate_packed(const void* x, const void* cos, const void* sin, void* y, float sign,
                         int64_t rows, int64_t heads, int64_t group, int64_t half, int64_t size,
                         int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    Heads all = {};
    all.row = static_cast<uint32_t>(heads), all.group = static_cast<uint32_t>(group);
    all.half = static_cast<uint32_t>(half), all.size = static_cast<uint32_t>(size);
    return start<T, kFull<T>>(static_cast<const T*>(x), static_cast<const T*>(cos),
                              static_cast<const T*>(sin), static_cast<T*>(y), sign, rows, all,
                              stream);
  });
}
