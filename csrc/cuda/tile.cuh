// Fill tiles of a 16-bit matrix in shared memory with a block of 256 threads.
#pragma once

#include "mma.cuh"

namespace apt {

constexpr int kTileColumns = 128;
constexpr int kTilePitch =
    kTileColumns + 8;  // 16 bytes more a row: eight rows start in eight different banks
constexpr int kTileChunks = kTileColumns / 8;  // 16-byte pieces a row

// The piece of a tile that a thread copies, and so may change before the block meets: column
// `piece_column()`, and of the rows every kThreads / kTileChunks-th from `piece_row()` on.
__device__ __forceinline__ int piece_column() { return threadIdx.x % kTileChunks * 8; }
__device__ __forceinline__ int piece_row() { return threadIdx.x / kTileChunks; }

// Starts copying matrix [rows_end, columns] from (row, column) on into `rows` rows of `to`; zeros beyond its
// edge.
template <int kThreads, class T>
__device__ __forceinline__ void stage_tile(T* to, const T* matrix, int64_t stride, int64_t row,
                                           int64_t rows_end, int64_t column, int64_t columns, int rows) {
  const int64_t c = column + piece_column();
  for (int r = piece_row(); r < rows; r += kThreads / kTileChunks) {
    bool valid = row + r < rows_end && c < columns;
    copy_async16(to + r * kTilePitch + piece_column(), valid ? matrix + (row + r) * stride + c : matrix,
                 valid);
  }
}

// Start copying `rows` rows of R ranks from `row` on, kMaxRank of them wide with zeros behind R; zeros beyond
// rows_end.
template <int kThreads, class T>
__device__ __forceinline__ void stage_ranks(T* to, const T* matrix, int64_t R, int64_t row, int64_t rows_end,
                                            int rows) {
  const int width = ranks_a_copy(R), pieces = kMaxRank / width;
  for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int m = i / pieces, r = i % pieces * width;
    const bool valid = row + m < rows_end && r < R;
    copy_ranks(to + m * kLowPitch + r, valid ? matrix + (row + m) * R + r : matrix, width, valid);
  }
}

}  // namespace apt
