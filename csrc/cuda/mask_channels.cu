// Scale a matrix by a mask along one side. Memory-bound: one read, one write, 16 bytes an access where the
// layout allows.
#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

// A thread owns kWidth neighbouring columns, so a column mask is read once, and walks down the rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads) apt_mask_channels(MaskChannelsArgs args) {
  int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (column >= args.cols) return;
  const T* src = static_cast<const T*>(args.src) + column * args.src_stride[1];
  T* dst = static_cast<T*>(args.dst) + column * args.dst_stride[1];
  Wide<T> factor[kWidth];
  if (!args.along_rows) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      factor[j] = mask_at<Wide<T>>(args.mask.data, args.mask.dtype, column + j);
    bool all_ones = args.src == args.dst;  // in place, channels that keep their values are not even read
#pragma unroll
    for (int j = 0; j < kWidth; ++j) all_ones &= factor[j] == Wide<T>(1);
    if (all_ones) return;
  }
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    if (args.along_rows) {
      Wide<T> one = mask_at<Wide<T>>(args.mask.data, args.mask.dtype, row);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) factor[j] = one;
    }
    if constexpr (kWidth == kVector<T>) {
      Packed<T> values = load128(src + row * args.src_stride[0]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values.at[j] = scaled(values.at[j], factor[j], args.select_only);
      store128(dst + row * args.dst_stride[0], values);
    } else {
      dst[row * args.dst_stride[0]] = scaled(src[row * args.src_stride[0]], factor[0], args.select_only);
    }
  }
}

// For rows that do not begin at whole 16 bytes, on either side: dst is contiguous, a thread writes 16 bytes
// of it wherever rows end, and gathers what belongs there one value at a time (neighbouring lanes of a warp
// share the lines).
template <class T, class Index>
__global__ void __launch_bounds__(256) apt_mask_channels_flat(MaskChannelsArgs args) {
  constexpr int kWidth = kVector<T>;
  const Index cols = static_cast<Index>(args.cols + args.pad_cols);
  const Index size = static_cast<Index>(args.rows + args.pad_rows) * cols;
  const Index first = (Index{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (first >= size) return;
  Index row = first / cols, column = first % cols;
  const T* src = static_cast<const T*>(args.src);
  Packed<T> values;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const bool valid = row < args.rows && column < args.cols;
    values.at[j] = valid ? src[row * args.src_stride[0] + column * args.src_stride[1]] : narrow<T>(0);
    if (valid && args.mask.data != nullptr) {
      const int64_t channel = args.along_rows ? row : column;
      values.at[j] =
          scaled(values.at[j], mask_at<Wide<T>>(args.mask.data, args.mask.dtype, channel), args.select_only);
    }
    if (++column == cols) column = 0, ++row;
  }
  T* dst = static_cast<T*>(args.dst);
  if (first + kWidth <= size) {
    store128(dst + first, values);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (first + j < size) dst[first + j] = values.at[j];
    }
  }
}

template <class T>
bool is_flat(const MaskChannelsArgs& args) {
  const int64_t cols = args.cols + args.pad_cols;
  return args.dst != args.src && args.dst_stride[1] == 1 && args.dst_stride[0] == cols &&
         is_aligned(args.dst);
}

template <class T>
void launch_flat(const MaskChannelsArgs& args, cudaStream_t stream) {
  const int64_t size = (args.rows + args.pad_rows) * (args.cols + args.pad_cols);
  const int64_t blocks = (size + 256 * kVector<T> - 1) / (256 * kVector<T>);
  visit_index(size, [&](auto index) {
    using Index = decltype(index);
    apt_mask_channels_flat<T, Index><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(args);
    check_launch("apt_mask_channels_flat");
  });
}

template <class T>
bool is_vectorizable(const MaskChannelsArgs& args) {
  constexpr int width = kVector<T>;
  return args.src_stride[1] == 1 && args.dst_stride[1] == 1 && args.cols % width == 0 &&
         args.pad_rows + args.pad_cols == 0 && args.src_stride[0] % width == 0 &&
         args.dst_stride[0] % width == 0 && is_aligned(args.src) && is_aligned(args.dst);
}

}  // namespace

void mask_channels(const MaskChannelsArgs& args, Stream stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool vector = is_vectorizable<T>(args);
    // The flat kernel alone fills rows and columns that src does not have. mask_channels_resized, which asks
    // for them, makes a dst that it takes.
    const bool fills = args.pad_rows + args.pad_cols > 0;
    if (!vector && (sizeof(T) == 2 || fills) && is_flat<T>(args)) {
      return launch_flat<T>(args, static_cast<cudaStream_t>(stream));
    }
    if (fills)
      throw std::logic_error(
          "mask_channels: rows and columns are added to a contiguous matrix of its own only");
    const dim3 grid = column_grid(vector ? args.cols / kVector<T> : args.cols, args.rows);
    auto queue = static_cast<cudaStream_t>(stream);
    if (vector) {
      apt_mask_channels<T, kVector<T>><<<grid, kColumnThreads, 0, queue>>>(args);
    } else {
      apt_mask_channels<T, 1><<<grid, kColumnThreads, 0, queue>>>(args);
    }
    check_launch("apt_mask_channels");
  });
}

}  // namespace apt::cuda
