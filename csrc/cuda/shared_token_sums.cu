// Sums over tokens of several layers that read the same x, for all their ranks together and without dropout:
//
//   partial [R, C] = sum over a span of tokens of low[m, r] x[m, c] of every layer, x read once
//
// As token_sums.cu does for one layer, to the bit.
#include "../backend.h"
#include "pipeline.cuh"
#include "tile.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 64;  // in a stage
constexpr int kSumStages = 4;

template <int kPairs>
struct SumSizes {
  static constexpr int kSlots = 16 * kPairs, kPitch = kSlots + 8;
  static constexpr int kStage = kTokens * (kTilePitch + kPitch);
  static constexpr int kBytes = kSumStages * kStage * 2 + kSlots * 4;
};

template <class T, int kPairs>
__device__ void find_slot_divisors(float* divisor, const SharedRanksArgs& args, int64_t token0,
                                   int64_t tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int slot = warp; slot < 16 * kPairs; slot += kThreads / 32) {
    const RankTile& ranks = args.tile[slot / 8];
    float largest = 0.f;
    if (slot % 8 < ranks.count) {
      const float* low = static_cast<const float*>(ranks.low) + token0 * ranks.low_stride + slot % 8;
#pragma unroll 8
      for (int64_t m = lane; m < tokens; m += 32) largest = fmaxf(largest, fabsf(low[m * ranks.low_stride]));
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    }
    if (lane == 0) divisor[slot] = half_divisor(largest);
  }
  __syncthreads();
}

template <class T, int kPairs>
__global__ void __launch_bounds__(kThreads, 2)
    apt_shared_token_sums(const __grid_constant__ SharedRanksArgs args) {
  using Size = SumSizes<kPairs>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* ring = reinterpret_cast<T*>(memory);
  float* divisor = reinterpret_cast<float*>(ring + kSumStages * Size::kStage);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel0 = int64_t{blockIdx.x} * kTileColumns;
  const int64_t token0 = int64_t{blockIdx.y} * args.span;
  const int64_t tokens = args.M - token0 < args.span ? args.M - token0 : args.span;
  const int count = static_cast<int>((tokens + kTokens - 1) / kTokens);
  const T* x = static_cast<const T*>(args.x);
  constexpr bool kWide = std::is_same_v<T, __half>;  // low is float32
  if constexpr (kWide) find_slot_divisors<T, kPairs>(divisor, args, token0, tokens);

  // A thread brings a tile's ranks of one token, where low is float32 through registers, a stage ahead.
  const int my_token = threadIdx.x / 4, my_tile = threadIdx.x % 4;
  float ahead[8];
  auto load_ahead = [&](int i) {
    const RankTile& ranks = args.tile[my_tile];
    const int64_t m = int64_t{i} * kTokens + my_token;
    const float* low = static_cast<const float*>(ranks.low) + (token0 + m) * ranks.low_stride;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      ahead[j] = m < tokens && j < ranks.count ? low[j] / divisor[my_tile * 8 + j] : 0.f;
  };
  auto fill = [&](int i) {
    T* tile = ring + i % kSumStages * Size::kStage;
    T* low = tile + kTokens * kTilePitch + my_token * Size::kPitch + my_tile * 8;
    const int64_t token = token0 + int64_t{i} * kTokens;
    stage_tile<kThreads>(tile, x, args.x_stride, token, token0 + tokens, channel0, args.C, kTokens);
    if (my_tile >= 2 * kPairs) return;
    if constexpr (kWide) {
#pragma unroll
      for (int j = 0; j < 8; ++j) low[j] = narrow<T>(ahead[j]);
      load_ahead(i + 1);
    } else {
      const RankTile& ranks = args.tile[my_tile];
      const T* all = static_cast<const T*>(args.x);  // an address that may be named where nothing is read
      const T* from = static_cast<const T*>(ranks.low) + (token + my_token) * ranks.low_stride;
      const int width = ranks_a_copy(ranks.low_stride);
      for (int j = 0; j < 8; j += width) {
        const bool valid = token + my_token < token0 + tokens && j < ranks.count;
        copy_ranks(low + j, valid ? from + j : all, width, valid);
      }
    }
  };
  if constexpr (kWide) {
    if (my_tile < 2 * kPairs) load_ahead(0);
  }
  for (int i = 0; i < kSumStages - 1; ++i) {
    if (i < count) fill(i);
    commit_copies();
  }
  float sum[2 * kPairs][4] = {};  // [16 channels of this warp][slots]
  for (int i = 0; i < count; ++i) {
    wait_copies<kSumStages - 2>();
    __syncthreads();
    if (i + kSumStages - 1 < count) fill(i + kSumStages - 1);
    commit_copies();
    const T* tile = ring + i % kSumStages * Size::kStage;
    const T* low = tile + kTokens * kTilePitch;
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t lhs[4];  // of x^T: channels are the rows
      load_matrices_transposed(
          lhs, tile + (k * 16 + lane / 16 * 8 + lane % 8) * kTilePitch + warp * 16 + lane / 8 % 2 * 8);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint32_t rhs[4];
        load_matrices_transposed(
            rhs, low + (k * 16 + lane % 8 + lane / 8 % 2 * 8) * Size::kPitch + pair * 16 + lane / 16 * 8);
        multiply<T>(sum[2 * pair], lhs, rhs[0], rhs[1]);
        multiply<T>(sum[2 * pair + 1], lhs, rhs[2], rhs[3]);
      }
    }
  }
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < 2 * kPairs; ++n) {
    const RankTile& ranks = args.tile[n];
    float* partial = ranks.partial + int64_t{blockIdx.y} * ranks.low_stride * args.C;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 2 * q + i % 2;
      const int64_t c = channel0 + warp * 16 + g + i / 2 * 8;
      if (r < ranks.count && c < args.C)
        partial[r * args.C + c] = kWide ? sum[n][i] * divisor[n * 8 + r] : sum[n][i];
    }
  }
}

template <class T, int kPairs>
void launch_sums(const SharedRanksArgs& args, cudaStream_t stream) {
  constexpr int kBytes = SumSizes<kPairs>::kBytes;
  allow_shared<&apt_shared_token_sums<T, kPairs>>(kBytes);
  const dim3 grid(static_cast<unsigned>((args.C + kTileColumns - 1) / kTileColumns),
                  static_cast<unsigned>((args.M + args.span - 1) / args.span));
  apt_shared_token_sums<T, kPairs><<<grid, kThreads, kBytes, stream>>>(args);
  check_launch("apt_shared_token_sums");
}

}  // namespace

void shared_token_sums(const SharedRanksArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.tiles > 2 ? launch_sums<T, 2>(args, queue) : launch_sums<T, 1>(args, queue);
  });
}

}  // namespace apt::cuda
