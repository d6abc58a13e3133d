// W <- diag(mask_out) (W + s B A) diag(mask_in) in one pass: W is read once and written once, the product is
// accumulated in registers in float32 (float64) and rounded once. No temporary of any size.
#include <algorithm>

#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

constexpr int kWarps = 8, kRowsAWarp = 4;
constexpr int kTileRows = kWarps * kRowsAWarp;  // rows of W a block owns
constexpr int kChunk = 16;                      // ranks staged in shared memory at a time

// A factor is W's own type or float32 over a 16-bit W.
template <class T>
__device__ __forceinline__ Wide<T> factor_at(const void* data, bool is_float32, int64_t i) {
  return is_float32 ? Wide<T>(static_cast<const float*>(data)[i]) : widen(static_cast<const T*>(data)[i]);
}

// A lane of a warp owns kWidth neighbouring columns, a warp every kWarps-th row of the tile.
template <class T, int kWidth>
__global__ void __launch_bounds__(kWarps * 32, 2) apt_merge(MergeArgs args) {
  using W = Wide<T>;
  if (args.unless != nullptr && *args.unless != 0) return;
  constexpr int kTileColumns = 32 * kWidth;
  __shared__ W tile_A[kChunk][kTileColumns];
  __shared__ W tile_B[kTileRows][kChunk];
  const bool wide_factors = args.factor_dtype == DType::kFloat32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column0 = int64_t{blockIdx.x} * kTileColumns;
  const int64_t column = column0 + lane * kWidth;
  W in[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    in[j] = column + j < args.K ? mask_at<W>(args.mask_in.data, args.mask_in.dtype, column + j) : W(0);
  }

  for (int64_t row0 = int64_t{blockIdx.y} * kTileRows; row0 < args.N;
       row0 += int64_t{gridDim.y} * kTileRows) {
    W sum[kRowsAWarp][kWidth] = {};
    for (int64_t r0 = 0; r0 < args.R; r0 += kChunk) {
      const int ranks = static_cast<int>(args.R - r0 < kChunk ? args.R - r0 : kChunk);
      __syncthreads();  // the last chunk has been used
      for (int i = threadIdx.x; i < ranks * kTileColumns; i += blockDim.x) {
        int r = i / kTileColumns, c = i % kTileColumns;
        tile_A[r][c] = column0 + c < args.K
                           ? factor_at<T>(args.lora_A, wide_factors, (r0 + r) * args.K + column0 + c)
                           : W(0);
      }
      for (int i = threadIdx.x; i < kTileRows * ranks; i += blockDim.x) {
        int n = i / ranks, r = i % ranks;
        tile_B[n][r] =
            row0 + n < args.N ? factor_at<T>(args.lora_B, wide_factors, (row0 + n) * args.R + r0 + r) : W(0);
      }
      __syncthreads();
      for (int r = 0; r < ranks; ++r) {
        W a[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) a[j] = tile_A[r][lane * kWidth + j];
#pragma unroll
        for (int i = 0; i < kRowsAWarp; ++i) {
          W b = tile_B[warp + i * kWarps][r];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[i][j] += b * a[j];
        }
      }
    }
    if (column >= args.K) continue;
#pragma unroll
    for (int i = 0; i < kRowsAWarp; ++i) {
      int64_t row = row0 + warp + i * kWarps;
      if (row >= args.N) continue;
      W out = mask_at<W>(args.mask_out.data, args.mask_out.dtype, row);
      T* at = static_cast<T*>(args.weight) + row * args.stride[0] + column * args.stride[1];
      Packed<T> values;
      if constexpr (kWidth == kVector<T>) {
        values = load128(at);
      } else {
        values.at[0] = *at;
      }
      bool bad = false;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        W kept = (widen(values.at[j]) + W(args.scaling) * sum[i][j]) * in[j] * out;
        values.at[j] = in[j] == W(0) || out == W(0) ? narrow<T>(0) : narrow<T>(kept);
        bad |= !isfinite(widen(values.at[j]));
      }
      if (args.not_finite != nullptr) {
        if (bad) *args.not_finite = 1;  // every writer writes the same
      } else if constexpr (kWidth == kVector<T>) {
        store128(at, values);
      } else {
        *at = values.at[0];
      }
    }
  }
}

template <class T, int kWidth>
void launch(const MergeArgs& args, cudaStream_t stream) {
  constexpr int kTileColumns = 32 * kWidth;
  int64_t across = (args.K + kTileColumns - 1) / kTileColumns;
  int64_t down = std::min<int64_t>((args.N + kTileRows - 1) / kTileRows, 65535);
  dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  apt_merge<T, kWidth><<<grid, kWarps * 32, 0, stream>>>(args);
  check_launch("apt_merge");
}

}  // namespace

namespace {

// On the tensor cores it is the up pass of low_rank.cu: rows of W are the output, lora_B is low and lora_A
// the factor.
bool is_up_pass(const MergeArgs& args) {
  auto fits = [](const Mask& mask) {
    return mask.data == nullptr || (mask.dtype == DType::kFloat32 && is_aligned(mask.data));
  };
  return args.plan.rows > 0 && args.dtype == args.factor_dtype && fits(args.mask_in) && fits(args.mask_out) &&
         args.stride[1] == 1 && args.stride[0] % 8 == 0 && is_aligned(args.weight) &&
         is_aligned(args.lora_A) && is_aligned(args.lora_B);
}

void merge_as_up_pass(const MergeArgs& args, Stream stream) {
  LowRankArgs up{};
  up.M = args.N, up.R = args.R, up.E = args.K;
  up.low = const_cast<void*>(args.lora_B);
  up.out = args.weight, up.out_stride = args.stride[0];
  up.up = {args.lora_A, /*by_channel=*/false};
  up.column_mask = static_cast<const float*>(args.mask_in.data);
  up.row_mask = static_cast<const float*>(args.mask_out.data);
  up.accumulate = true, up.scaling = args.scaling;
  up.dtype = up.low_dtype = args.dtype;
  up.not_finite = args.not_finite, up.unless = args.unless;
  up.rows = args.plan.rows, up.column_splits = args.plan.splits;
  low_rank(up, stream);
}

}  // namespace

void merge(const MergeArgs& args, Stream stream) {
  if (is_up_pass(args)) return merge_as_up_pass(args, stream);
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool vector = args.stride[1] == 1 && args.stride[0] % kVector<T> == 0 && args.K % kVector<T> == 0 &&
                  is_aligned(args.weight);
    auto queue = static_cast<cudaStream_t>(stream);
    vector ? launch<T, kVector<T>>(args, queue) : launch<T, 1>(args, queue);
  });
}

}  // namespace apt::cuda
