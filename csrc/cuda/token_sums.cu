// Sum over tokens x[m, c] low[m, r] of a wide x and a narrow low: the gradients of the factors.
//
// Blocks that own 128 channels and a span of tokens write partial sums in float32. A second launch adds them
// in fixed order, scales, masks and rounds once: no atomics, so the same bits twice.
#include <algorithm>

#include "../backend.h"
#include "pipeline.cuh"
#include "tile.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 64;  // in a stage
constexpr int kStages = 4;
constexpr int kStage = kTokens * (kTilePitch + kLowPitch);  // a tile of x and the same tokens of low
constexpr int kSharedBytes = kStages * kStage * 2 + kMaxRank * 4;
static_assert(kTokens * kMaxRank == kThreads * 4);

// Where low is float32, a rank is divided by the power of two that brings its largest value of this span into
// float16's range, and the sum multiplied by it again.
template <class T>
__device__ void find_divisors(float* divisor, const float* low, int64_t R, int64_t tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < kMaxRank; r += kWarps) {
    float largest = 0.f;
    if (r < R) {
#pragma unroll 8
      for (int64_t m = lane; m < tokens; m += 32) largest = fmaxf(largest, fabsf(low[m * R + r]));
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    }
    if (lane == 0) divisor[r] = std::is_same_v<T, __half> ? half_divisor(largest) : 1.f;
  }
  __syncthreads();
}

template <class T, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) apt_token_sums(const __grid_constant__ TokenSumArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* ring = reinterpret_cast<T*>(memory);
  float* divisor = reinterpret_cast<float*>(ring + kStages * kStage);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel0 = int64_t{blockIdx.x} * kTileColumns;
  const int64_t token0 = int64_t{blockIdx.y} * args.span;
  const int64_t tokens = args.M - token0 < args.span ? args.M - token0 : args.span;
  const int count = static_cast<int>((tokens + kTokens - 1) / kTokens);
  const T* x = static_cast<const T*>(args.x);
  const bool wide = args.low_dtype == DType::kFloat32;
  [[maybe_unused]] DrawsIf<kDrops> draws(args.dropout);
  if constexpr (kDrops) hold_keys(draws);
  const float* wide_low = static_cast<const float*>(args.low) + token0 * args.R;
  if (wide) find_divisors<T>(divisor, wide_low, args.R, tokens);

  // float32 values of low come through registers, a stage ahead, since they are rounded on the way: four
  // ranks a thread.
  const int my_token = threadIdx.x / 4, my_rank = threadIdx.x % 4 * 4;
  float ahead[4];
  auto load_ahead = [&](int i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = int64_t{i} * kTokens + my_token;
      ahead[j] = m < tokens && my_rank + j < args.R
                     ? wide_low[m * args.R + my_rank + j] / divisor[my_rank + j]
                     : 0.f;
    }
  };
  // Zeros beyond the span, in x as in low.
  auto fill = [&](int i) {
    T* tile = ring + i % kStages * kStage;
    T* low = tile + kTokens * kTilePitch;
    const int64_t token = token0 + int64_t{i} * kTokens;
    stage_tile<kThreads>(tile, x, args.x_stride, token, token0 + tokens, channel0, args.C, kTokens);
    if (wide) {
#pragma unroll
      for (int j = 0; j < 4; ++j) low[my_token * kLowPitch + my_rank + j] = narrow<T>(ahead[j]);
      load_ahead(i + 1);
    } else {
      stage_ranks<kThreads>(low, static_cast<const T*>(args.low), args.R, token, token0 + tokens, kTokens);
    }
  };
  // Of a stage a thread drops in what it copied itself, before the others read it. It draws while it waits.
  constexpr int kPieces = kTokens / (kThreads / kTileChunks);
  [[maybe_unused]] uint32_t words[kPieces][4];
  [[maybe_unused]] auto draw = [&](int i) {
    const int64_t token = token0 + int64_t{i} * kTokens + piece_row();
    const auto group = static_cast<uint32_t>((channel0 + piece_column()) / 8);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if constexpr (kDrops) draws.draw(group, token + p * (kThreads / kTileChunks), words[p]);
    }
  };
  [[maybe_unused]] auto drop = [&](int i) {
    T* tile = ring + i % kStages * kStage + piece_row() * kTilePitch + piece_column();
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      auto* piece = reinterpret_cast<Eight*>(tile + p * (kThreads / kTileChunks) * kTilePitch);
      Eight values = *piece;
      if constexpr (kDrops) drop_eight(values, draws, words[p]);
      piece->all = values.all;
    }
  };
  if (wide) load_ahead(0);
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fill(i);
    commit_copies();
  }
  float sum[2][4] = {};  // [16 channels of this warp][R]
  for (int i = 0; i < count; ++i) {
    if constexpr (kDrops) draw(i);
    wait_copies<kStages - 2>();
    if constexpr (kDrops) drop(i);
    __syncthreads();
    if (i + kStages - 1 < count) fill(i + kStages - 1);
    commit_copies();
    const T* tile = ring + i % kStages * kStage;
    const T* low = tile + kTokens * kTilePitch;
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t lhs[4], rhs[4];  // of x^T: channels are the rows
      load_matrices_transposed(
          lhs, tile + (k * 16 + lane / 16 * 8 + lane % 8) * kTilePitch + warp * 16 + lane / 8 % 2 * 8);
      load_matrices_transposed(rhs, low + (k * 16 + lane % 8 + lane / 8 % 2 * 8) * kLowPitch + lane / 16 * 8);
      multiply<T>(sum[0], lhs, rhs[0], rhs[1]);
      multiply<T>(sum[1], lhs, rhs[2], rhs[3]);
    }
  }
  float* partial = args.partial + int64_t{blockIdx.y} * args.R * args.C;  // [R, C]
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int r = e / 4 * 8 + 2 * q + e % 2;
    const int64_t c = channel0 + warp * 16 + g + e % 4 / 2 * 8;
    if (r < args.R && c < args.C)
      partial[r * args.C + c] = wide ? sum[e / 4][e % 4] * divisor[r] : sum[e / 4][e % 4];
  }
}

constexpr int kAddThreads = 128;
constexpr int kAddLanes =
    4;  // of a warp that share the spans of an entry: few entries leave a chip waiting for memory

// One job of the second launch: entry i = (r, e) of the gradient, of which this lane adds every fourth span.
template <class T, class Index>
__device__ __forceinline__ void add_spans(const FactorGrad& job, Index i, int lane) {
  const Index E = static_cast<Index>(job.E), r = i / E, e = i % E;
  const int64_t c = job.position == nullptr ? int64_t{e} : int64_t{job.position[e]};
  float value = 0.f;
  if (c >= 0) {
    const int64_t size = job.R * job.C;
    const float* partial = job.partial + r * job.C + c;
#pragma unroll 8
    for (int64_t s = lane; s < job.spans; s += kAddLanes) value += partial[s * size];
  }
#pragma unroll
  for (int apart = 16; apart > 16 / kAddLanes; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  if (lane != 0) return;
  if (c >= 0) {
    const float mask = job.mask == nullptr ? 1.f : job.mask[c];
    value = mask == 0.f ? 0.f : value * float(job.scaling) * mask;
  }
  static_cast<T*>(job.grad)[job.by_channel ? e * static_cast<Index>(job.R) + r : i] = narrow<T>(value);
}

// A warp has 32 / kAddLanes neighbouring entries, which are neighbours in a partial sum as well: 32 bytes.
template <class Index>
__global__ void __launch_bounds__(kAddThreads) apt_add_spans(const __grid_constant__ FactorGrads grads) {
  constexpr int kEntries = 32 / kAddLanes;
  const FactorGrad& job = grads.job[blockIdx.y];
  const int lane = threadIdx.x % 32 / kEntries;
  const Index size = static_cast<Index>(job.R * job.E);
  const Index first = (Index{blockIdx.x} * (kAddThreads / 32) + threadIdx.x / 32) * kEntries;
  if (first >= size) return;  // the whole warp
  // A warp's lanes add together, so one beyond the last entry does the last once more: the same bits.
  const Index own = first + threadIdx.x % kEntries, i = own < size ? own : size - 1;
  switch (job.dtype) {
    case DType::kFloat16:
      return add_spans<__half>(job, i, lane);
    case DType::kBFloat16:
      return add_spans<__nv_bfloat16>(job, i, lane);
    default:
      return add_spans<float>(job, i, lane);
  }
}

template <class T, bool kDrops>
void launch(const TokenSumArgs& args, cudaStream_t stream) {
  allow_shared<&apt_token_sums<T, kDrops>>(kSharedBytes);
  dim3 grid(static_cast<unsigned>((args.C + kTileColumns - 1) / kTileColumns),
            static_cast<unsigned>((args.M + args.span - 1) / args.span));
  apt_token_sums<T, kDrops><<<grid, kThreads, kSharedBytes, stream>>>(args);
  check_launch("apt_token_sums");
}

}  // namespace

void token_sums(const TokenSumArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.dropout.rng == nullptr ? launch<T, false>(args, queue) : launch<T, true>(args, queue);
  });
}

void add_spans(const FactorGrads& grads, Stream stream) {
  int64_t largest = 0;
  unsigned jobs = 0;
  for (; jobs < kFactorGrads && grads.job[jobs].grad != nullptr; ++jobs) {
    largest = std::max(largest, grads.job[jobs].R * grads.job[jobs].E);
  }
  constexpr int kEach = kAddThreads / kAddLanes;
  const dim3 grid(static_cast<unsigned>((largest + kEach - 1) / kEach), jobs);
  auto queue = static_cast<cudaStream_t>(stream);
  visit_index(largest, [&](auto index) {
    apt_add_spans<decltype(index)><<<grid, kAddThreads, 0, queue>>>(grads);
    check_launch("apt_add_spans");
  });
}

}  // namespace apt::cuda
