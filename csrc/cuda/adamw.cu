// AdamW (arXiv 1711.05101) on flat shards in one pass: each gradient, moment and master weight is
// read once, and each moment, master weight and rounded parameter is written once.
//
//   g  = gradient / divisor
//   m' = b1 m + (1 - b1) g                  v' = b2 v + (1 - b2) g^2
//   w' = w - lr (decay w + m' / c1 / (sqrt(v' / c2) + eps)),  c = 1 - b^t
//
// Whatever the host would have to wait for is read on the device: the divisor, whether the step is
// to be skipped, and the number of steps taken.
//
// A beta near 1 loses digits of 1 - beta in float32: 0.999 would be off by 1e-5 there, and with it
// the mean that it keeps. So the kernels take gain = 1 - b, and every use of b follows from it.

#include "tiles.cuh"

namespace megatron {
namespace {

constexpr int kPack = 4;     // elements of float32 in 16 bytes
constexpr int kUnrolled = 2;  // packs of a thread whose loads are in flight together

// The parts of a row. Where the master is the parameter itself there is no other, and 0.
enum Part { kGradient, kMean, kSquare, kMaster, kParameter, kPartCount };

struct Decays {
  float of[kTogether];  // learning rate times weight decay
};

// What follows from the number of steps.
struct Scale {
  float rate;  // lr / c1
  float root;  // 1 / sqrt(c2)
};

// 1 - (1 - gain)^steps
__device__ __forceinline__ double correction(float gain, float steps) {
  return -expm1(static_cast<double>(steps) * log1p(-static_cast<double>(gain)));
}

// One thread, before all others of the step.
__global__ void __launch_bounds__(1)
    count_step(float* steps, const bool* skipped, float lr, float mean_gain, float square_gain,
               Scale* scale) {
  if (*skipped) return;
  float taken = *steps + 1.0f;
  *steps = taken;
  scale->rate = static_cast<float>(lr / correction(mean_gain, taken));
  scale->root = static_cast<float>(1.0 / sqrt(correction(square_gain, taken)));
}

// (1 - gain) old + gain fresh, from the nearer of the two.
__device__ __forceinline__ float blend(float old, float fresh, float gain) {
  float change = fresh - old;
  return gain < 0.5f ? fmaf(gain, change, old) : fmaf(gain - 1.0f, change, fresh);
}

template <typename T, int V>
__global__ void __launch_bounds__(kInBlock)
    update(const Rows<kPartCount> rows, const Decays decays, const Scale* scale,
           const bool* skipped, const float* divisor, float mean_gain, float square_gain,
           float eps) {
  constexpr bool kRounds = sizeof(T) < sizeof(float);
  constexpr int kStride = kInBlock * V;
  Tile tile = find(rows, static_cast<int>(blockIdx.x));
  const uintptr_t* part = rows.address[tile.row];
  const float* gradient = reinterpret_cast<const float*>(part[kGradient]);
  float* mean = reinterpret_cast<float*>(part[kMean]);
  float* square = reinterpret_cast<float*>(part[kSquare]);
  float* master = reinterpret_cast<float*>(part[kMaster]);
  T* parameter = reinterpret_cast<T*>(part[kParameter]);
  float decay = decays.of[tile.row];
  bool idle = *skipped;
  float by = divisor ? *divisor : 1.0f;
  float rate = scale->rate, root = scale->root;
  for (int64_t from = tile.begin + threadIdx.x * V; from < tile.end; from += kUnrolled * kStride) {
    float g[kUnrolled][V], m[kUnrolled][V], v[kUnrolled][V], w[kUnrolled][V];
#pragma unroll
    for (int i = 0; i < kUnrolled; i++) {
      int64_t at = from + i * kStride;
      if (at >= tile.end) continue;
      load<V>(gradient + at, g[i]);
      load<V>(mean + at, m[i]);
      load<V>(square + at, v[i]);
      load<V>(master + at, w[i]);
    }
    // Only here, so that the first loads need not wait for the flag.
    if (idle) return;
#pragma unroll
    for (int i = 0; i < kUnrolled; i++) {
      int64_t at = from + i * kStride;
      if (at >= tile.end) continue;
#pragma unroll
      for (int j = 0; j < V; j++) {
        float slope = g[i][j] / by;
        m[i][j] = blend(m[i][j], slope, mean_gain);
        v[i][j] = blend(v[i][j], slope * slope, square_gain);
        float direction = m[i][j] / fmaf(sqrtf(v[i][j]), root, eps);
        w[i][j] -= fmaf(rate, direction, decay * w[i][j]);
      }
      store<V>(mean + at, m[i]);
      store<V>(square + at, v[i]);
      store<V>(master + at, w[i]);
      if constexpr (kRounds) store<V>(parameter + at, w[i]);
    }
  }
}

}  // namespace
}  // namespace megatron

// Counts the step and leaves in `scale`, two floats, what `adamw_update` needs. All pointers but
// those named as the host's are the device's; `skipped` is a bool.
EXPORT int adamw_count_step(void* steps, const void* skipped, void* scale, float lr,
                            float mean_gain, float square_gain, megatron::Stream stream) {
  using namespace megatron;
  return launch(count_step, dim3(1), dim3(1), 0, stream, static_cast<float*>(steps),
                static_cast<const bool*>(skipped), lr, mean_gain, square_gain,
                static_cast<Scale*>(scale));
}

// `divisor` is a float or null. `table` (tiles.cuh) and `decays`, a float for each of its rows, are
// the host's. `format` is that of the parameters.
EXPORT int adamw_update(const void* scale, const void* skipped, const void* divisor,
                        const void* table, const void* decays, int64_t count, float mean_gain,
                        float square_gain, float eps, int64_t format, megatron::Stream stream) {
  using namespace megatron;
  return with_format(format, [&](auto t) {
    using T = typename decltype(t)::type;
    return together<kPartCount>(table, count, [&](const Rows<kPartCount>& rows, int64_t before) {
      auto kernel = all_fit<kPack>(rows) ? update<T, kPack> : update<T, 1>;
      Decays own = {};
      for (int row = 0; row < rows.count; row++)
        own.of[row] = static_cast<const float*>(decays)[before + row];
      return launch(kernel, dim3(static_cast<unsigned>(rows.tiles)), dim3(kInBlock), 0, stream,
                    rows, own, static_cast<const Scale*>(scale), static_cast<const bool*>(skipped),
                    static_cast<const float*>(divisor), mean_gain, square_gain, eps);
    });
  });
}
