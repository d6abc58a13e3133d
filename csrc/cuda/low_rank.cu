// Everything around the dense product, in passes at the speed of memory:
//
//   down   low [M, R] = (mask * x) down^T, and on the way the masked copy of x that the dense product reads
//   up     out [M, E] = row_mask * column_mask * (out + scaling low up^T + bias)
//
// in one launch or alone, and `up` alone is also the merge of a weight. A lane copies, multiplies and writes
// its own 16 bytes of a row, and nothing changes hands in between: a product may sum its depth in any order
// and number its columns in any order, so the eight neighbours of a lane are simply declared to be the
// entries of the fragments that it holds.
//
// Blocks go through the rows from the last to the first: the product that follows starts with the first, and
// finds what was touched last still in the L2 cache.
#include "kernels.h"
#include "queue.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = 256, kSplits = kThreads / 32;  // the warps of a block split the columns
constexpr int kRank = 16;                               // R padded with zeros
constexpr int kLowPitch = kRank + 8;                    // of the rows of `low` in shared memory
constexpr int kMostRows = 32;                           // of x and out a block owns: 16 or 32
constexpr int kStep = 64;    // columns a warp does at a time: 128 bytes of a row, a whole line
constexpr int kPieces = 12;  // of 16 bytes that a thread needs a step: at most 8 of x or out, 4 of the factor
constexpr int kStages = 2;   // the step at work and the next
static_assert(kRank == kMostRank);

// A block owns 16 * kTiles rows, each warp all of them, and its warps divide the columns.
template <class T, int kTiles>
struct Block {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kFactorPiece = 4 * kTiles;  // behind the pieces of x or out

  const LowRankArgs& args;
  Queue<kStages, kPieces, kThreads> queue;
  T* low;            // [kRows][kLowPitch]
  float* row_scale;  // [kRows]: what `low` was divided by

  const int64_t row0 = int64_t{gridDim.x - 1 - blockIdx.x} * kRows;
  const int lane = threadIdx.x % 32, split = threadIdx.x / 32;
  const int g = lane / 4, q = lane % 4;  // see mma.cuh

  // Row of tile t that this lane holds: g or, half, g + 8.
  __device__ __forceinline__ int row_of(int t, int half) const { return t * 16 + half * 8 + g; }

  // The first of the eight columns that this lane holds in side s, the first or second 32 columns of a step.
  __device__ __forceinline__ int64_t column_of(int step, int s) const {
    return int64_t{step} * kStep + s * 32 + q * 8;
  }

  __device__ __forceinline__ static int row_piece(int s, int t, int half) {
    return (s * kTiles + t) * 2 + half;
  }

  // This lane's columns of its rows of a matrix with `columns` columns.
  __device__ __forceinline__ void push_rows(int stage, int step, const T* matrix, int64_t stride,
                                            int64_t columns) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + row_of(t, half);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int64_t column = column_of(step, s);
          queue.push(stage, row_piece(s, t, half), matrix + row * stride + column, matrix,
                     row < args.M && column < columns);
        }
      }
    }
  }

  // Half a piece of ranks, p in 0 to 3.
  __device__ __forceinline__ unsigned char* rank_piece(int stage, int s, int p) const {
    return queue.memory + (stage * kPieces + kFactorPiece + 2 * s) * kThreads * 16 +
           (p * kThreads + int(threadIdx.x)) * 8;
  }

  // A product's depth is half a side. Lane (g, q) holds columns 8q to 8q + 7 of a side: pairs 0 and 1 for the
  // first product, 2 and 3 for the second. So slot 2j + e of product h, pair p, is column 8j + 4h + 2p + e.
  template <bool kMasked>
  __device__ __forceinline__ void down() {
    const T* x = static_cast<const T*>(args.x);
    const T* factor = static_cast<const T*>(args.down.data);
    T* masked = static_cast<T*>(args.masked);
    float sum[kTiles][2][4] = {};
    const bool by_channel = args.down.by_channel;
    Mask8 mask[2];
    float channel_mask[2][4];  // of the channels that this lane reads, where the factor is stored by channel
    auto channel_of = [&](int step, int s, int p) {
      return int64_t{step} * kStep + s * 32 + g / 2 * 8 + p * 2 + g % 2;
    };
    auto fill = [&](int step, int stage) {
      push_rows(stage, step, x, args.x_stride, args.C);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (!by_channel) {
          const int64_t column = column_of(step, s);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int rank = n * 8 + g;
            queue.push(stage, kFactorPiece + 2 * s + n, factor + rank * args.C + column, factor,
                       rank < args.R && column < args.C);
          }
        } else {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const int64_t channel = channel_of(step, s, p);
            push_ranks(rank_piece(stage, s, p), factor + channel * args.R, factor, q * 4, args.R,
                       channel < args.C);
          }
        }
      }
    };
    auto early = [&](int step) {
      if constexpr (kMasked) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int64_t column = column_of(step, s);
          mask[s].load(args.mask + column, column < args.C);
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const int64_t channel = channel_of(step, s, p);
            channel_mask[s][p] = by_channel && channel < args.C ? args.mask[channel] : 1.f;
          }
        }
      }
    };
    auto body = [&](int step, int stage) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t column = column_of(step, s);
        Eight values[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            values[t][half] = queue.pop(stage, row_piece(s, t, half));
            if constexpr (kMasked) {
              mask_eight<T>(values[t][half], mask[s], false);
              const int64_t row = row0 + row_of(t, half);
              if (masked != nullptr && column < args.C && row < args.M) {
                const auto& pair = values[t][half].pair;
                store_words(masked + row * args.C + column, pair[0], pair[1], pair[2], pair[3]);
              }
            }
          }
        }
        uint32_t rhs[2][2][2];  // [product][tile of 8 ranks][pair]
        if (!by_channel) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Eight eight = queue.pop(stage, kFactorPiece + 2 * s + n);
            if constexpr (kMasked) mask_eight<T>(eight, mask[s], true);
#pragma unroll
            for (int p = 0; p < 4; ++p) rhs[p / 2][n][p % 2] = eight.pair[p];
          }
        } else {
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            uint2 ranks = *reinterpret_cast<const uint2*>(rank_piece(stage, s, p));
            if (kMasked && channel_mask[s][p] == 0.f) ranks = {0, 0};
            rhs[p / 2][0][p % 2] = transposed(ranks.x);
            rhs[p / 2][1][p % 2] = transposed(ranks.y);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const uint32_t lhs[4] = {values[t][0].pair[2 * h], values[t][1].pair[2 * h],
                                     values[t][0].pair[2 * h + 1], values[t][1].pair[2 * h + 1]};
#pragma unroll
            for (int n = 0; n < 2; ++n) multiply<T>(sum[t][n], lhs, rhs[h][n][0], rhs[h][n][1]);
          }
        }
      }
    };
    queue.run(split, static_cast<int>((args.C + kStep - 1) / kStep), kSplits, fill, early, body);
    __syncthreads();  // nobody's queue is in use
    add_splits(sum);
    if (split == 0) write_low(sum, by_channel);
    __syncthreads();
  }

  // Adds the sums of the warps that share rows, in the same order each time; split 0 has them in the end.
  __device__ __forceinline__ void add_splits(float (&sum)[kTiles][2][4]) {
    constexpr int kValues = kTiles * 8;
    float* sums = reinterpret_cast<float*>(queue.memory);
    float* flat = &sum[0][0][0];
#pragma unroll
    for (int step = kSplits / 2; step > 0; step /= 2) {
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

  // `low` to global memory, and to shared memory in 16 bits, where a row may have to be divided to fit
  // float16.
  __device__ __forceinline__ void write_low(const float (&sum)[kTiles][2][4], bool by_channel) {
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
          if (args.low != nullptr && r < args.R && row0 + row < args.M) {
            const int64_t at = (row0 + row) * args.R + r;
            if (args.low_dtype == DType::kFloat32) {
              static_cast<float*>(args.low)[at] = value;
            } else {
              static_cast<T*>(args.low)[at] = narrow<T>(value);
            }
          }
        }
      }
    }
  }

  // `low` from global memory, as write_low leaves it.
  __device__ __forceinline__ void read_low() {
    constexpr int threads = kThreads / kRows;  // a row: 8 or 16, neighbours in a warp
    const int row = threadIdx.x / threads, first = threadIdx.x % threads;
    const int64_t at = (row0 + row) * args.R;
    auto value = [&](int r) {
      if (r >= args.R || row0 + row >= args.M) return 0.f;
      return args.low_dtype == DType::kFloat32 ? static_cast<const float*>(args.low)[at + r]
                                               : widen(static_cast<const T*>(args.low)[at + r]);
    };
    float divisor = 1.f;
    if constexpr (std::is_same_v<T, __half>) {
      float largest = 0.f;
      for (int r = first; r < kRank; r += threads) largest = fmaxf(largest, fabsf(value(r)));
      for (int step = threads / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      divisor = half_divisor(largest);
    }
    for (int r = first; r < kRank; r += threads) low[row * kLowPitch + r] = narrow<T>(value(r) / divisor);
    if (first == 0) row_scale[row] = divisor;
    __syncthreads();
  }

  // Of each side of a step lane (g, q) holds columns 8q to 8q + 7: four products of 8 columns, the j-th with
  // columns 8q + 2j and 8q + 2j + 1. Of the ranks it holds 4q to 4q + 3. kPlain: out = scaling low up^T and
  // nothing else.
  template <bool kPlain>
  __device__ __forceinline__ void up() {
    T* out = static_cast<T*>(args.out);
    const T* factor = static_cast<const T*>(args.up.data);
    const T* bias = static_cast<const T*>(args.bias);
    const bool by_channel = args.up.by_channel, accumulate = !kPlain && args.accumulate;
    uint32_t lhs[kTiles][4];
    float row_factor[kTiles][2], row_mask[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(t, half);
        row_factor[t][half] = float(args.scaling) * row_scale[row];
        row_mask[t][half] =
            !kPlain && args.row_mask != nullptr && row0 + row < args.M ? args.row_mask[row0 + row] : 1.f;
        const uint2 ranks = *reinterpret_cast<const uint2*>(low + row * kLowPitch + q * 4);
        lhs[t][half] = ranks.x, lhs[t][2 + half] = ranks.y;
      }
    }
    bool bad = false;
    Mask8 mask[2];
    Eight shift[2];
    auto fill = [&](int step, int stage) {
      if (accumulate) push_rows(stage, step, out, args.out_stride, args.E);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (by_channel) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int64_t channel = int64_t{step} * kStep + s * 32 + g / 2 * 8 + j * 2 + g % 2;
            push_ranks(rank_piece(stage, s, j), factor + channel * args.R, factor, q * 4, args.R,
                       channel < args.E);
          }
        } else {
          const int64_t column = column_of(step, s);
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const int rank = g / 2 * 4 + p * 2 + g % 2;
            queue.push(stage, kFactorPiece + 2 * s + p, factor + rank * args.E + column, factor,
                       column < args.E && rank < args.R);
          }
        }
      }
    };
    auto early = [&](int step) {
      if constexpr (!kPlain) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int64_t column = column_of(step, s);
          mask[s].load(args.column_mask + column, args.column_mask != nullptr && column < args.E);
          const bool has_bias = bias != nullptr && column < args.E;
          shift[s].all = has_bias ? *reinterpret_cast<const uint4*>(bias + column) : uint4{0, 0, 0, 0};
        }
      }
    };
    auto body = [&](int step, int stage) {
      uint32_t rhs[2][4][2];  // [side][product][pair]
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (by_channel) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint2 ranks = *reinterpret_cast<const uint2*>(rank_piece(stage, s, j));
            rhs[s][j][0] = ranks.x, rhs[s][j][1] = ranks.y;
          }
        } else {
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const Eight eight = queue.pop(stage, kFactorPiece + 2 * s + p);
#pragma unroll
            for (int j = 0; j < 4; ++j) rhs[s][j][p] = transposed(eight.pair[j]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int64_t column = column_of(step, s);
          float sum[4][4] = {};
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply<T>(sum[j], lhs[t], rhs[s][j][0], rhs[s][j][1]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + row_of(t, half);
            Eight old;
            if (accumulate) old = queue.pop(stage, row_piece(s, t, half));
            float result[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              float& value = result[j];
              value = sum[j / 2][half * 2 + j % 2] * row_factor[t][half];
              if constexpr (!kPlain) {
                value += widen(reinterpret_cast<const T*>(shift[s].pair)[j]);
                if (accumulate) value += widen(reinterpret_cast<const T*>(old.pair)[j]);
                const bool pruned = mask[s].at[j] == 0.f || row_mask[t][half] == 0.f;
                value = pruned ? 0.f : value * mask[s].at[j] * row_mask[t][half];
              }
              if (!kPlain && args.not_finite != nullptr) bad |= !isfinite(widen(narrow<T>(value)));
            }
            if (column < args.E && row < args.M && (kPlain || args.not_finite == nullptr)) {
              store_words(out + row * args.out_stride + column, two<T>(result[0], result[1]),
                          two<T>(result[2], result[3]), two<T>(result[4], result[5]),
                          two<T>(result[6], result[7]));
            }
          }
        }
      }
    };
    queue.run(int(blockIdx.y) * kSplits + split, static_cast<int>((args.E + kStep - 1) / kStep),
              int(gridDim.y) * kSplits, fill, early, body);
    if (!kPlain && args.not_finite != nullptr && bad) *args.not_finite = 1;  // every writer writes the same
  }

  __device__ __forceinline__ void run() {
    if (args.x == nullptr) {
      read_low();
    } else if (args.mask != nullptr) {
      down<true>();
    } else {
      down<false>();
    }
    if (args.out == nullptr) return;
    const bool plain =
        !args.accumulate && args.bias == nullptr && args.column_mask == nullptr && args.row_mask == nullptr;
    plain ? up<true>() : up<false>();
  }
};

constexpr int kQueueBytes = kStages * kPieces * kThreads * 16;
constexpr int kSharedBytes = kQueueBytes + kMostRows * kLowPitch * 2 + kMostRows * 4;

template <class T>
__global__ void __launch_bounds__(kThreads, 2) apt_low_rank(const __grid_constant__ LowRankArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  if (args.unless != nullptr && *args.unless != 0) return;
  T* low = reinterpret_cast<T*>(memory + kQueueBytes);
  float* row_scale = reinterpret_cast<float*>(low + kMostRows * kLowPitch);
  if (args.rows == 32) {
    Block<T, 2>{args, {memory}, low, row_scale}.run();
  } else {
    Block<T, 1>{args, {memory}, low, row_scale}.run();
  }
}

template <class T>
void launch(const LowRankArgs& args, cudaStream_t stream) {
  allow_shared<&apt_low_rank<T>>(kSharedBytes);
  dim3 grid(static_cast<unsigned>((args.M + args.rows - 1) / args.rows),
            static_cast<unsigned>(args.column_splits));
  apt_low_rank<T><<<grid, kThreads, kSharedBytes, stream>>>(args);
  check_launch("apt_low_rank");
}

}  // namespace

void low_rank(const LowRankArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  args.dtype == DType::kFloat16 ? launch<__half>(args, queue) : launch<__nv_bfloat16>(args, queue);
}

}  // namespace apt::cuda
