// Rows of the narrow matrix `low` [M, R] in a block of 256 threads. All warps own the same rows, each sums
// over its own columns, and their sums are added here.
#pragma once

#include "mma.cuh"

namespace apt {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

template <class T, int kTiles>
struct LowRows {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kBytes = kRows * (kLowPitch * 2 + 4);  // of shared memory

  T* low;            // [kRows][kLowPitch], in 16 bits
  float* row_scale;  // [kRows]: what a row of `low` was divided by to fit float16
  int64_t row0, M, R;
  const int thread = threadIdx.x % kRowThreads, lane = thread % 32, split = thread / 32;
  const int g = lane / 4, q = lane % 4;  // see mma.cuh

  __device__ __forceinline__ LowRows(unsigned char* memory, int64_t row0, int64_t M, int64_t R)
      : low(reinterpret_cast<T*>(memory)),
        row_scale(reinterpret_cast<float*>(low + kRows * kLowPitch)),
        row0(row0),
        M(M),
        R(R) {}

  // Row of tile t that this lane holds: g or, half, g + 8.
  __device__ __forceinline__ int row_of(int t, int half) const { return t * 16 + half * 8 + g; }

  // Adds the sums of the warps that share rows, in the same order each time; split 0 has them in the end.
  // `scratch` is free shared memory.
  __device__ __forceinline__ void add_splits(float (&sum)[kTiles][2][4], void* scratch) {
    constexpr int kValues = kTiles * 8;
    float* sums = static_cast<float*>(scratch);
    float* flat = &sum[0][0][0];
#pragma unroll
    for (int step = kRowWarps / 2; step > 0; step /= 2) {
      float* at = sums + split % step * kValues * 32 + lane;
      if (split >= step && split < 2 * step) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) at[i * 32] = flat[i];
      }
      __syncthreads();
      if (split < step) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) flat[i] += at[i * 32];
      }
      __syncthreads();
    }
  }

  // `low` to global memory if there is a place, and to shared memory. by_channel: a lane's ranks are 4q to 4q
  // + 3 instead of 2q, 2q + 1, 2q + 8 and 2q + 9.
  __device__ __forceinline__ void write(const float (&sum)[kTiles][2][4], bool by_channel, void* to,
                                        DType to_dtype) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(t, half);
        float divisor = 1.f;
        if constexpr (std::is_same_v<T, __half>) {
          float largest = 0.f;
#pragma unroll
          for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(sum[t][i / 2][half * 2 + i % 2]));
          for (int step = 1; step < 4; step *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
          divisor = half_divisor(largest);
        }
        if (q == 0) row_scale[row] = divisor;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = i / 2, e = i % 2;
          const int r = by_channel ? q * 4 + n * 2 + e : n * 8 + q * 2 + e;
          const float value = sum[t][n][half * 2 + e];
          low[row * kLowPitch + r] = narrow<T>(value / divisor);
          if (to != nullptr && r < R && row0 + row < M) {
            const int64_t at = (row0 + row) * R + r;
            if (to_dtype == DType::kFloat32) {
              static_cast<float*>(to)[at] = value;
            } else {
              static_cast<T*>(to)[at] = narrow<T>(value);
            }
          }
        }
      }
    }
  }

  // `low` from global to shared memory, as write leaves it, in two parts: what this thread brings, and its
  // place.
  static constexpr int kBringing = kRowThreads / kRows;  // threads a row, 8 or 16, neighbours in a warp
  static constexpr int kBrought = kMaxRank / kBringing;  // ranks a thread
  __device__ __forceinline__ void fetch(const void* from, DType from_dtype, float (&value)[kBrought]) const {
    const int64_t row = row0 + thread / kBringing;
#pragma unroll
    for (int i = 0; i < kBrought; ++i) {
      const int r = thread % kBringing + i * kBringing;
      const int64_t at = row * R + r;
      value[i] = r >= R || row >= M              ? 0.f
                 : from_dtype == DType::kFloat32 ? static_cast<const float*>(from)[at]
                                                 : widen(static_cast<const T*>(from)[at]);
    }
  }
  __device__ __forceinline__ void place(const float (&value)[kBrought]) {
    const int row = thread / kBringing, first = thread % kBringing;
    float divisor = 1.f;
    if constexpr (std::is_same_v<T, __half>) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < kBrought; ++i) largest = fmaxf(largest, fabsf(value[i]));
      for (int step = kBringing / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      divisor = half_divisor(largest);
    }
#pragma unroll
    for (int i = 0; i < kBrought; ++i)
      low[row * kLowPitch + first + i * kBringing] = narrow<T>(value[i] / divisor);
    if (first == 0) row_scale[row] = divisor;
  }
  __device__ __forceinline__ void read(const void* from, DType from_dtype) {
    float value[kBrought];
    fetch(from, from_dtype, value);
    place(value);
    __syncthreads();
  }

  // This lane's part of a tile of `low` as the left operand of a product, and what to multiply a row's
  // results with. by_four: the slots of depth are numbered so that a lane holds ranks 4q to 4q + 3.
  __device__ __forceinline__ void operand(int t, bool by_four, uint32_t (&lhs)[4], float (&factor)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(t, half);
      const T* ranks = low + row * kLowPitch + (by_four ? 4 : 2) * q;
      factor[half] = row_scale[row];
      lhs[half] = *reinterpret_cast<const uint32_t*>(ranks);
      lhs[2 + half] = *reinterpret_cast<const uint32_t*>(ranks + (by_four ? 2 : 8));
    }
  }
};

}  // namespace apt
