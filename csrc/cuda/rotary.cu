// Queries, keys and values taken out of the product that makes them, or put back together, and
// turned on the way by rotary positions (arXiv 2104.09864), where there are any.
//
//   first, second -> first cos - second sin, second cos + first sin
//
// The product has its heads in groups: some queries, the key that they share, and their value. All
// but the value are turned. A head's channel i is the first of a pair whose second is channel
// half + i, for i < half; the channels from 2 half on are copied, and so is the value. The backward
// pass turns back.

#include "dispatch.cuh"

namespace megatron {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 2;  // units of a thread that are loaded at once
constexpr int kTile = kThreads * kFlight;
constexpr int64_t kMost = (int64_t{1} << 31) - 2 * kTile;  // units of a launch

// Divides numbers below 2^31 by one that the host knows, of which it has the reciprocal less 1,
// rounded up (Granlund and Montgomery, "Division by Invariant Integers using Multiplication").
struct Divisor {
  uint32_t by, reciprocal, shift;

  Divisor(int64_t number) : by(static_cast<uint32_t>(number)), shift(0) {
    while ((uint64_t{1} << shift) < by) shift++;
    uint64_t beyond = (uint64_t{1} << shift) - by;
    reciprocal = static_cast<uint32_t>((beyond << 32) / by + 1);
  }
};

__device__ __forceinline__ uint32_t operator/(uint32_t number, const Divisor& divisor) {
  return (__umulhi(number, divisor.reciprocal) + number) >> divisor.shift;
}

// Queries, keys or values [position, sample, head, channel]: channels side by side, and so many
// elements from one of the others to the next.
template <typename T>
struct Part {
  T* data;
  int64_t position, sample, head;
};

// A unit is what a thread turns or copies at once, two packs of pairs or one of other channels.
template <typename T>
struct Heads {
  T* mixed;
  const T *cos, *sin;  // null where nothing is turned
  Part<T> parts[3];    // query, key, value
  int64_t angles_of_position, angles_of_sample;  // elements from one to the next
  uint32_t units, row;                           // in all; heads of a position of a sample
  uint32_t half, size;
  Divisor samples, in_row, in_head, group;  // units of a row and of a head, heads of a group
};

// Where a unit lies, and how far behind a pair's first channels its second are.
template <typename T>
struct Place {
  T *mixed, *part;
  int64_t angle;
  uint32_t gap;
  bool exists, turns;
};

template <int V, typename T>
__device__ __forceinline__ Place<T> find(const Heads<T>& heads, uint32_t unit) {
  uint32_t row = unit / heads.in_row;
  unit -= row * heads.in_row.by;
  uint32_t position = row / heads.samples, sample = row - position * heads.samples.by;
  uint32_t head = unit / heads.in_head, column = (unit - head * heads.in_head.by) * V;
  uint32_t group = head / heads.group, member = head - group * heads.group.by;
  uint32_t shared = heads.group.by - 2;
  bool is_pair = column < heads.half, is_query = member < shared, is_key = member == shared;
  uint32_t channel = is_pair ? column : heads.half + column;
  const Part<T>& part = is_query ? heads.parts[0] : is_key ? heads.parts[1] : heads.parts[2];
  uint32_t own = is_query ? group * shared + member : group;
  Place<T> place;
  place.mixed = heads.mixed + (static_cast<int64_t>(row) * heads.row + head) * heads.size + channel;
  place.part = part.data + position * part.position + sample * part.sample + own * part.head +
               channel;
  place.angle = position * heads.angles_of_position + sample * heads.angles_of_sample +
                (is_pair ? column : 0);
  place.gap = is_pair ? heads.half : 0;
  place.turns = is_pair && (is_query || is_key) && heads.cos != nullptr;
  return place;
}

// `sign` is 1, or -1 to turn back.
template <typename T, int V, bool kJoins>
__global__ void __launch_bounds__(kThreads) move(const Heads<T> heads, float sign) {
  uint32_t begin = blockIdx.x * kTile;
  float first[kFlight][V], second[kFlight][V], c[kFlight][V], s[kFlight][V];
  Place<T> places[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; i++) {
    // The last block's threads without a unit of their own load the last one again.
    uint32_t unit = begin + threadIdx.x + i * kThreads;
    places[i] = find<V>(heads, min(unit, heads.units - 1));
    places[i].exists = unit < heads.units;
    const T* from = kJoins ? places[i].part : places[i].mixed;
    load<V>(from, first[i]);
    load<V>(from + places[i].gap, second[i]);
#pragma unroll
    for (int j = 0; j < V; j++) c[i][j] = s[i][j] = 0.0f;
    if (heads.cos != nullptr) {
      load<V>(heads.cos + places[i].angle, c[i]);
      load<V>(heads.sin + places[i].angle, s[i]);
    }
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
    T* to = kJoins ? places[i].mixed : places[i].part;
    store<V>(to, first[i]);
    if (places[i].gap) store<V>(to + places[i].gap, second[i]);
  }
}

// Whether packs of V elements lie at whole multiples of their size.
template <typename T>
bool lies_in_packs(const Heads<T>& heads, int64_t V) {
  uintptr_t addresses =
      reinterpret_cast<uintptr_t>(heads.mixed) | reinterpret_cast<uintptr_t>(heads.cos) |
      reinterpret_cast<uintptr_t>(heads.sin);
  int64_t steps = int64_t{heads.half} | heads.size;
  for (const Part<T>& part : heads.parts) {
    addresses |= reinterpret_cast<uintptr_t>(part.data);
    steps |= part.position | part.sample | part.head;
  }
  return steps % V == 0 && addresses % (V * sizeof(T)) == 0;
}

// With packs of V elements, or of as many as the channels and addresses allow; of more positions
// than one launch takes by several.
template <int V, typename T>
int start(Heads<T> heads, int64_t positions, bool joins, float sign, Stream stream) {
  if constexpr (V > 1)
    if (!lies_in_packs(heads, V)) return start<V / 2>(heads, positions, joins, sign, stream);
  int64_t in_head = (heads.size - heads.half) / V, in_row = in_head * heads.row;
  int64_t of_position = in_row * heads.samples.by;
  if (of_position > kMost) return kUnknownFormat;
  heads.in_head = Divisor(in_head);
  heads.in_row = Divisor(in_row);
  int64_t at_once = kMost / of_position;
  for (int64_t begin = 0; begin < positions; begin += at_once) {
    int64_t count = positions - begin < at_once ? positions - begin : at_once;
    heads.units = static_cast<uint32_t>(count * of_position);
    auto kernel = joins ? move<T, V, true> : move<T, V, false>;
    dim3 grid(static_cast<unsigned>(divide_up(heads.units, kTile)));
    if (int error = launch(kernel, grid, dim3(kThreads), 0, stream, heads, sign)) return error;
    heads.mixed += count * heads.samples.by * heads.row * heads.size;
    for (Part<T>& part : heads.parts) part.data += count * part.position;
    if (heads.cos != nullptr) {
      heads.cos += count * heads.angles_of_position;
      heads.sin += count * heads.angles_of_position;
    }
  }
  return 0;
}

}  // namespace
}  // namespace megatron

// mixed is [positions, samples, groups, shared + 2, size] without gaps; `joins` says that it is
// written and the others are read. `strides`, on the host, is i64[4, 3]: of query, key and value
// those of position, sample and head, of cos and sin, which may be null, those of the first two.
EXPORT int move_heads(void* mixed, const void* cos, const void* sin, void* query, void* key,
                      void* value, const void* strides, int64_t joins, float sign,
                      int64_t positions, int64_t samples, int64_t groups, int64_t shared,
                      int64_t half, int64_t size, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t* stride = static_cast<const int64_t*>(strides);
    auto part = [&](void* data, int number) {
      const int64_t* own = stride + 3 * number;
      return Part<T>{static_cast<T*>(data), own[0], own[1], own[2]};
    };
    // Where nothing is turned any pairs will do that make whole packs.
    if (cos == nullptr) half = size / (2 * kFull<T>) * kFull<T>;
    Heads<T> heads = {static_cast<T*>(mixed),
                      static_cast<const T*>(cos),
                      static_cast<const T*>(sin),
                      {part(query, 0), part(key, 1), part(value, 2)},
                      stride[9],
                      stride[10],
                      0,
                      static_cast<uint32_t>(groups * (shared + 2)),
                      static_cast<uint32_t>(half),
                      static_cast<uint32_t>(size),
                      samples,
                      1,
                      1,
                      shared + 2};
    return start<kFull<T>>(heads, positions, joins, sign, stream);
  });
}
