// The kernels of a device, as structures of pointers, sizes, strides and a stream. Free of torch, so every
// .cu file compiles in seconds, and on a machine without a CUDA torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "philox.h"
#include "scalar.h"

namespace apt {

// How merge_plan cuts the merge of a weight for tensor cores. rows 0: use the kernel without them.
struct MergePlan {
  int rows = 0, splits = 0;
};

// A mask along one side of a matrix, in float32 or the matrix' own dtype. Null data means all ones.
struct Mask {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Scale a matrix by a mask over its columns, or rows: dst[i, j] = mask == 0 ? 0 : src[i, j] * mask.
// src and dst may be the same matrix.
struct MaskChannelsArgs {
  const void* src;  // [rows, cols], strides in elements
  void* dst;        // [rows + pad_rows, cols + pad_cols], 0 in what src does not fill; contiguous if padded
  int64_t rows, cols;
  int64_t pad_rows, pad_cols;
  int64_t src_stride[2], dst_stride[2];
  Mask mask;
  bool along_rows;   // the mask has one value a row instead of one a column
  bool select_only;  // only zeros act: fractions do not scale
  DType dtype;
};

// Copy a matrix without what is dropped of it: dst[i, j] = 0 where (i, channel j) is dropped, else src[i, j].
// src and dst may be the same matrix.
struct DropChannelsArgs {
  const void* src;  // [rows, cols], strides in elements
  void* dst;        // the same; ignored if `keep` is given
  bool* keep;       // null, or [rows, cols] contiguous: written instead, true where a value is kept
  int64_t rows, cols;
  int64_t src_stride[2], dst_stride[2];
  const int32_t* channel;  // [cols]: which channel a column is, below 0: none, kept; null: the column itself
  Dropout dropout;
  DType dtype;
};

// Merge factors into a weight: weight <- diag(mask_out) (weight + scaling B A) diag(mask_in), accumulated in
// float32 (float64) and rounded once.
struct MergeArgs {
  void* weight;        // [N, K], strides in elements; one of them is usually 1
  const void* lora_A;  // [R, K] contiguous
  const void* lora_B;  // [N, R] contiguous
  int64_t N, K, R;
  int64_t stride[2];
  Mask mask_in, mask_out;
  double scaling;
  DType dtype, factor_dtype;
  int32_t* not_finite;    // null: write. Else write nothing, and set it where a result is not finite.
  const int32_t* unless;  // null, or: do nothing where *unless is not 0
  MergePlan plan;
  void* scratch;  // on the CPU, merge_scratch bytes; on CUDA none
};

// One gradient of mask_grads_, seen as [outer, channels, inner] contiguous.
struct MaskedGrad {
  void* grad;
  const void* mask;
  int64_t size, channels, inner;
  DType dtype, mask_dtype;
};

// A low-rank factor in the compute dtype, contiguous: [R, channels], or by_channel [channels, R].
struct Factor {
  const void* data = nullptr;
  bool by_channel = false;
};

// The passes around the dense product, for 16-bit types (cuda/low_rank.cu).
//   with x    low = (mask * x) down^T, and the masked x to `masked` if that is given
//   with out  out = row_mask * column_mask * (accumulate * out + scaling low up^T + bias)
// At most one of drop_x (of mask * x, for low alone) and drop_out (of low up^T) drops anything.
// Every pointer is aligned to 16 bytes. C, E and the strides are multiples of 8. R is at most kMaxRank.
struct LowRankArgs {
  int64_t M, R;
  const void* x;  // [M, C], rows x_stride apart; null: low is an input
  int64_t x_stride, C;
  Factor down;        // over C
  const float* mask;  // [C], or null
  void* masked;       // [M, C] contiguous, or null
  void* low;          // [M, R] contiguous, of the compute dtype or float32; null: computed and not kept
  void* out;          // [M, E], rows out_stride apart, or null
  int64_t out_stride, E;
  Factor up;                            // over E
  const void* bias;                     // [E] of the compute dtype, or null
  const float *column_mask, *row_mask;  // [E], [M], or null
  bool accumulate;
  double scaling;
  DType dtype, low_dtype;
  Dropout drop_x, drop_out;
  int32_t* not_finite;      // as in MergeArgs
  const int32_t* unless;    // as in MergeArgs
  int rows, column_splits;  // of a block, from launch_plan
};

// Sum over the tokens m of span s: partial[s] [R, C] = sum of x[m, c] low[m, r] (cuda/token_sums.cu). The
// conditions of LowRankArgs hold.
struct TokenSumArgs {
  int64_t M, R, C;
  const void* x;  // [M, C], rows x_stride apart
  int64_t x_stride;
  const void* low;  // [M, R] contiguous, of the compute dtype or float32
  float* partial;   // [ceil(M / span), R, C]
  DType dtype, low_dtype;
  int64_t span;     // tokens a block, a multiple of 64, from launch_plan
  Dropout dropout;  // of x
};

// Add up partial sums: grad [R, E], or by_channel [E, R] = mask * scaling * the sum of `spans` partial sums
// [R, C]. Channel e of the gradient is channel e of the sums, or channel position[e] of them. It is zero
// where the mask is 0 or position[e] is negative.
struct FactorGrad {
  const float* partial;
  void* grad = nullptr;  // float32 or 16-bit
  int64_t spans, R, C, E;
  const float* mask;        // [C], or null
  const int32_t* position;  // [E], or null
  double scaling;
  DType dtype;
  bool by_channel;
};

constexpr int kFactorGrads = 8;

struct FactorGrads {
  FactorGrad job[kFactorGrads];  // those behind the last have a null grad
};

// At most 8 ranks of one of several layers that read the same x.
struct RankTile {
  const void* factor = nullptr;  // rows of lora_A, [count, C] contiguous
  void* low = nullptr;           // columns of low [M, low_stride], of the compute dtype or, float16, float32
  float* partial = nullptr;      // rows of the first of the token sums, [spans, low_stride, C]
  int64_t low_stride = 0;        // the layer's rank
  int count = 0;
  Dropout dropout = {};  // down: of x; up: of low A; for token sums none
};

constexpr int kRankTiles = 4;  // that one launch takes

// The narrow products of such layers, all in one launch (cuda/shared_linear.cu): down, up or token sums. The
// conditions of LowRankArgs hold.
struct SharedRanksArgs {
  int64_t M, C;
  const void* x;  // [M, C], rows x_stride apart; up: any aligned address that may be read
  int64_t x_stride;
  void* out;  // up: [M, C] contiguous
  RankTile tile[kRankTiles];
  int tiles;  // the others hold nothing
  bool accumulate;
  double scaling;
  DType dtype, low_dtype;
  int rows, column_splits;  // as in LowRankArgs; more than two tiles have 16 rows a block
  int64_t span;             // as in TokenSumArgs
};

// Sum |values[m, c]| (or values[m, c]) over the tokens m that count. What the others hold is not read.
struct ChannelSumArgs {
  int64_t M, C;
  const void* values;  // [M, C], rows `stride` apart
  int64_t stride;
  const bool* tokens;  // [M], or null: all count
  void* out;           // [C] float32, or float64 for float64
  void* partial;       // [spans, C] like out; not needed for one span
  int64_t spans;       // of tokens, each summed by itself first; the CPU cuts by its threads
  DType dtype;
  bool is_signed;
};

// Bring a matrix into float16's range:
//   inverse     the smallest power of two >= 1 that brings every entry of wide / inverse to at most 2^15; 1
//               where an entry is Inf or NaN
//   half        wide / inverse, rounded to float16
//   multiplier  scaling * inverse
//   grown       factor * inverse in float16: exact, or so large that no product with it can be represented
struct ToHalfArgs {
  int64_t count;
  const float* wide;  // [count]
  void* half;         // [count]
  uint32_t* largest;  // [1], scratch
  float* multiplier;  // [1]
  double scaling;
  int64_t factor_count;
  const void* factor;  // [factor_count]
  void* grown;         // [factor_count]
};

constexpr int64_t kStagedBytes = 113664;  // of shared memory a block of a staged gather or scatter takes

// Gather the kept channels of a matrix side by side:
//   gathered[m, j] = mask[index[j]] * x[row_index[m], index[j]], and 0 where the mask is 0
// An index of -1 is a zero that pads.
struct GatherArgs {
  int64_t M, C, kept;  // rows of the result; columns of x; columns of the result, padding included
  const void* x;       // [.., C], strides in elements
  int64_t x_stride[2];
  const int32_t* row_index;  // [M], or null: row m is row m
  const int32_t* index;      // [kept]; staged: ascending and then -1
  Mask mask;                 // [C]
  void* gathered;            // [M, kept] contiguous
  DType dtype;
  // Go through shared memory and read every line once: on CUDA only, for 16-bit types with rows of whole 16
  // bytes at aligned addresses, a float32 mask, no row_index, and kStagedBytes for a block. Such a pass can
  // multiply on the way: low [M, R] = gathered down^T with down [R, kept] and R at most kMaxRank. Null low:
  // none.
  bool staged;
  void* low;
  const void* down;
  int64_t R;
  DType low_dtype;
};

// Scatter kept channels back to their places:
//   out[m, c] = mask[c] * (values[m, position[c]] + bias[c] + scaling (low up^T)[m, c])
// and 0 where position[c] is negative or the mask is 0.
struct ScatterArgs {
  int64_t M, E, kept;       // rows; columns of out; columns of values
  const void* values;       // [M, kept] contiguous
  const int32_t* position;  // [E]; of a pruned channel ~(the number of kept channels before it)
  Mask mask;                // [E]
  const void* bias;         // [E] of the compute dtype, or null
  void* out;                // [M, E] contiguous
  DType dtype;
  bool staged;      // as in GatherArgs
  const void* low;  // [M, R] contiguous
  const void* up;   // [E, R] contiguous
  int64_t R;
  double scaling;
  DType low_dtype;
};

// Copy one small matrix into another layout: dst[i, j] = mask * src[row_index[i], column_index[j]], and 0
// where the mask is 0, an index is negative, or src has no such row or column.
struct FactorCopy {
  const void* src;
  void* dst = nullptr;    // contiguous, by_column: as [columns, rows]; null: nothing to do
  int64_t rows, columns;  // of dst
  int64_t src_rows, src_columns, src_stride[2];
  const int32_t *row_index, *column_index;  // [rows], [columns], or null: i and j themselves
  Mask mask;                                // of src's columns, or rows
  bool mask_of_rows, select_only, by_column;
  DType dtype;
};

// Two copies in one launch: a layer's factors, or their gradients.
struct FactorCopies {
  FactorCopy job[2];
};

using Stream = void*;  // cudaStream_t; null on the CPU

// The functions of a device. kernels_for (device.h) looks them up once a call.
struct Kernels {
  void (*mask_channels)(const MaskChannelsArgs&, Stream);
  void (*drop_channels)(const DropChannelsArgs&, Stream);
  void (*merge)(const MergeArgs&, Stream);
  size_t (*merge_scratch)(const MergeArgs&) = nullptr;  // bytes; null: it needs none
  void (*mask_grads)(const MaskedGrad*, size_t count, Stream);
  void (*gather)(const GatherArgs&, Stream);
  void (*scatter)(const ScatterArgs&, Stream);
  void (*channel_sums)(const ChannelSumArgs&, Stream);
  void (*copy_factors)(const FactorCopies&, Stream);
  // Null where the device leaves the low-rank products to the library.
  void (*low_rank)(const LowRankArgs&, Stream) = nullptr;
  void (*token_sums)(const TokenSumArgs&, Stream) = nullptr;
  void (*add_spans)(const FactorGrads&, Stream) = nullptr;
  void (*to_half)(const ToHalfArgs&, Stream) = nullptr;
  void (*shared_down)(const SharedRanksArgs&, Stream) = nullptr;
  void (*shared_up)(const SharedRanksArgs&, Stream) = nullptr;
  void (*shared_token_sums)(const SharedRanksArgs&, Stream) = nullptr;
};

// One file a function, in cpu/ and cuda/.
namespace cpu {
void mask_channels(const MaskChannelsArgs& args, Stream);
void drop_channels(const DropChannelsArgs& args, Stream);
void merge(const MergeArgs& args, Stream);
size_t merge_scratch(const MergeArgs& args);
void mask_grads(const MaskedGrad* grads, size_t count, Stream);
void gather(const GatherArgs& args, Stream);
void scatter(const ScatterArgs& args, Stream);
void channel_sums(const ChannelSumArgs& args, Stream);
void copy_factors(const FactorCopies& copies, Stream);
}  // namespace cpu

namespace cuda {
void mask_channels(const MaskChannelsArgs& args, Stream stream);
void drop_channels(const DropChannelsArgs& args, Stream stream);
void merge(const MergeArgs& args, Stream stream);
void mask_grads(const MaskedGrad* grads, size_t count, Stream stream);
void gather(const GatherArgs& args, Stream stream);
void scatter(const ScatterArgs& args, Stream stream);
void channel_sums(const ChannelSumArgs& args, Stream stream);
void copy_factors(const FactorCopies& copies, Stream stream);
void low_rank(const LowRankArgs& args, Stream stream);
void token_sums(const TokenSumArgs& args, Stream stream);
void add_spans(const FactorGrads& grads, Stream stream);  // token_sums.cu
void to_half(const ToHalfArgs& args, Stream stream);
void shared_down(const SharedRanksArgs& args, Stream stream);  // shared_linear.cu
void shared_up(const SharedRanksArgs& args, Stream stream);    // shared_linear.cu
void shared_token_sums(const SharedRanksArgs& args, Stream stream);
}  // namespace cuda

}  // namespace apt
