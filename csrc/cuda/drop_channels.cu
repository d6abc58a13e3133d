// Drop elements of a matrix, drawn by counters. Memory-bound: one read, one write, 16 bytes an access where the
// layout allows. For products that the library makes; passes of our own draw for themselves.
#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

constexpr int kGroup = 8;  // neighbours that one draw serves

// A thread owns eight neighbouring columns and walks down the rows. kOwn: columns are channels themselves, so
// that the eight share a draw.
template <class T, bool kOwn, bool kWide>
__global__ void __launch_bounds__(kColumnThreads)
    apt_drop_channels(const __grid_constant__ DropChannelsArgs args) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kGroup;
  if (column >= args.cols) return;
  const Draws draws(args.dropout);
  int channel[kGroup];
  if constexpr (!kOwn) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) channel[j] = column + j < args.cols ? args.channel[column + j] : -1;
  }
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    uint32_t words[4];
    uint32_t kept = 0;  // bit j: column j
    if constexpr (kOwn) {
      draws.draw(static_cast<uint32_t>(column / kGroup), row, words);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) kept |= uint32_t{draws.keeps(words, j)} << j;
    } else {
      int drawn = -1;  // kept channels ascend: neighbours often lie in one group
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int group = channel[j] / kGroup, place = channel[j] % kGroup;
        if (channel[j] >= 0 && group != drawn) draws.draw(static_cast<uint32_t>(drawn = group), row, words);
        const uint32_t pair = place < 2 ? words[0] : place < 4 ? words[1] : place < 6 ? words[2] : words[3];
        const bool keeps = channel[j] < 0 || (place % 2 == 0 ? pair << 16 : pair) >= draws.threshold;
        kept |= uint32_t{keeps} << j;
      }
    }
    if (args.keep != nullptr) {
      bool* to = args.keep + row * args.cols + column;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (column + j < args.cols) to[j] = kept >> j & 1;
      }
      continue;
    }
    const T* from = static_cast<const T*>(args.src) + row * args.src_stride[0] + column * args.src_stride[1];
    T* to = static_cast<T*>(args.dst) + row * args.dst_stride[0] + column * args.dst_stride[1];
    if constexpr (kWide) {
#pragma unroll
      for (int piece = 0; piece < kGroup / kVector<T>; ++piece) {
        Packed<T> values = load128(from + piece * kVector<T>);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          if ((kept >> (piece * kVector<T> + j) & 1) == 0) values.at[j] = narrow<T>(0);
        }
        store128(to + piece * kVector<T>, values);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (column + j >= args.cols) break;
        const T value = from[j * args.src_stride[1]];
        to[j * args.dst_stride[1]] = (kept >> j & 1) != 0 ? value : narrow<T>(0);
      }
    }
  }
}

template <class T>
bool is_wide(const DropChannelsArgs& args) {
  return args.keep == nullptr && args.cols % kGroup == 0 && args.src_stride[1] == 1 &&
         args.dst_stride[1] == 1 && args.src_stride[0] % kVector<T> == 0 &&
         args.dst_stride[0] % kVector<T> == 0 && is_aligned(args.src) && is_aligned(args.dst);
}

}  // namespace

void drop_channels(const DropChannelsArgs& args, Stream stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const dim3 grid = column_grid((args.cols + kGroup - 1) / kGroup, args.rows);
  auto queue = static_cast<cudaStream_t>(stream);
  visit(args.keep != nullptr ? DType::kFloat32 : args.dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_flags(args.channel == nullptr, is_wide<T>(args), [&](auto own, auto wide) {
      apt_drop_channels<T, own.value, wide.value><<<grid, kColumnThreads, 0, queue>>>(args);
      check_launch("apt_drop_channels");
    });
  });
}

}  // namespace apt::cuda
