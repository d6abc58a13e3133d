// Sum over tokens, one sum a channel, in one pass that reads the values once.
//
// Blocks that own some channels and a span of tokens write partial sums. A second launch adds them in fixed
// order: no atomics, so the same bits twice.
#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kAhead = 4;  // rows of a warp that are loaded before any is added

// A lane owns kWidth neighbouring channels; the warps of a block take turns with the tokens of its span.
template <class T, int kWidth>
__global__ void __launch_bounds__(kWarps * 32) apt_channel_sums(ChannelSumArgs args) {
  __shared__ Wide<T> sums[kWarps][32 * kWidth];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.x} * 32 * kWidth, channel = first + lane * kWidth;
  const int64_t span = (args.M + args.spans - 1) / args.spans;
  const int64_t begin = int64_t{blockIdx.y} * span, end = begin + span < args.M ? begin + span : args.M;
  Wide<T> sum[kWidth] = {};
  if (channel < args.C) {
    const T* values = static_cast<const T*>(args.values) + channel;
    for (int64_t row = begin + warp; row < end; row += kWarps * kAhead) {
      T at[kAhead][kWidth];
      bool counts[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t m = row + i * kWarps;
        counts[i] = m < end && (args.tokens == nullptr || args.tokens[m]);
        if (!counts[i]) continue;
        if constexpr (kWidth == 1) {
          at[i][0] = values[m * args.stride];
        } else {
          *reinterpret_cast<Packed<T>*>(at[i]) = load128(values + m * args.stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!counts[i]) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Wide<T> value = widen(at[i][j]);
          sum[j] += args.is_signed ? value : fabs(value);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) sums[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  Wide<T>* to = args.spans == 1 ? static_cast<Wide<T>*>(args.out)
                                : static_cast<Wide<T>*>(args.partial) + blockIdx.y * args.C;
  for (int i = threadIdx.x; i < 32 * kWidth; i += kWarps * 32) {
    Wide<T> total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][i];
    const int64_t c = first + i % 32 * kWidth + i / 32;
    if (c < args.C) to[c] = total;
  }
}

constexpr int kAddThreads = 128;

template <class W>
__global__ void __launch_bounds__(kAddThreads) apt_add_channel_sums(ChannelSumArgs args) {
  const int64_t c = int64_t{blockIdx.x} * kAddThreads + threadIdx.x;
  if (c >= args.C) return;
  const W* partial = static_cast<const W*>(args.partial) + c;
  W total = 0;
#pragma unroll 8
  for (int64_t s = 0; s < args.spans; ++s) total += partial[s * args.C];
  static_cast<W*>(args.out)[c] = total;
}

template <class T, int kWidth>
void launch(const ChannelSumArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.C + 32 * kWidth - 1) / (32 * kWidth)),
                  static_cast<unsigned>(args.spans));
  apt_channel_sums<T, kWidth><<<grid, kWarps * 32, 0, stream>>>(args);
  check_launch("apt_channel_sums");
  if (args.spans == 1) return;
  const auto blocks = static_cast<unsigned>((args.C + kAddThreads - 1) / kAddThreads);
  apt_add_channel_sums<Wide<T>><<<blocks, kAddThreads, 0, stream>>>(args);
  check_launch("apt_add_channel_sums");
}

}  // namespace

void channel_sums(const ChannelSumArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = kVector<T>;
    const bool whole = args.C % kWidth == 0 && args.stride % kWidth == 0 && is_aligned(args.values);
    whole ? launch<T, kWidth>(args, queue) : launch<T, 1>(args, queue);
  });
}

}  // namespace apt::cuda
