// Compute what stands around the dense product, in passes at the speed of memory:
//
//   down   low [M, R] = (mask * x) down^T, and on the way the masked copy of x that the dense product reads
//   up     out [M, E] = row_mask * column_mask * (out + scaling low up^T + bias)
//
// in one launch or alone. `up` alone is also the merge of a weight.
//
// A lane copies, multiplies and writes its own 16 bytes of a row, without exchange between lanes. A product
// may sum its depth in any order and number its columns in any order, so the eight neighbours of a lane are
// simply declared to be the entries of the fragments that it holds.
//
// Blocks go through the rows from the last to the first. The product that follows starts with the first, and
// finds what was touched last still in the L2 cache.
#include "../backend.h"
#include "low_rows.cuh"
#include "pipeline.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = kRowThreads, kSplits = kRowWarps;  // the warps of a block split the columns
constexpr int kMostRows = 32;                               // of x and out a block owns: 16 or 32
constexpr int kStep = 64;    // columns a warp does at a time: 128 bytes of a row, a whole line
constexpr int kPieces = 12;  // of 16 bytes that a thread needs a step: at most 8 of x or out, 4 of the factor
constexpr int kStages = 2;   // the step at work and the next

// What `up` does beside out = scaling low up^T: a body each, since one for all waits for what is not there.
enum class Adds { kNothing, kBias, kAll };

// A block owns 16 * kTiles rows, each warp all of them, and its warps divide the columns. kDropX, kDropOut: a
// kernel each, at most one of them, so that what does not draw keeps its registers.
template <class T, int kTiles, bool kDropX, bool kDropOut>
struct Block : LowRows<T, kTiles> {
  using Rows = LowRows<T, kTiles>;
  using Rows::g, Rows::q, Rows::split, Rows::row0, Rows::row_of;
  static constexpr int kRows = Rows::kRows;
  static constexpr int kFactorPiece = 4 * kTiles;  // behind the pieces of x or out
  // A merge drops nothing, and what drops of its output is a gradient, which has no bias.
  static constexpr bool kMerges = !kDropX && !kDropOut, kHasBias = !kDropOut;

  const LowRankArgs& args;
  Queue<kStages, kPieces, kThreads> queue;

  __device__ __forceinline__ Block(const LowRankArgs& args, unsigned char* memory, unsigned char* low_memory)
      : Rows(low_memory, int64_t{gridDim.x - 1 - blockIdx.x} * kRows, args.M, args.R),
        args(args),
        queue{memory} {}

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
    [[maybe_unused]] const DrawsIf<kDropX> draws(args.drop_x);
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
            if constexpr (kDropX) {
              uint32_t words[4];
              draws.draw(static_cast<uint32_t>(column / 8), row0 + row_of(t, half), words);
              drop_eight(values[t][half], draws, words);
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
    __syncthreads();  // all queues are free
    this->add_splits(sum, queue.memory);
    if (split == 0) this->write(sum, by_channel, args.low, args.low_dtype);
    __syncthreads();
  }

  // Of each side of a step lane (g, q) holds columns 8q to 8q + 7: four products of 8 columns, the j-th with
  // columns 8q + 2j and 8q + 2j + 1. Of the ranks it holds 4q to 4q + 3.
  template <Adds kAdds>
  __device__ __forceinline__ void up() {
    constexpr bool kAll = kAdds == Adds::kAll, kShifts = kHasBias && kAdds != Adds::kNothing;
    [[maybe_unused]] const DrawsIf<kDropOut> draws(args.drop_out);
    T* out = static_cast<T*>(args.out);
    const T* factor = static_cast<const T*>(args.up.data);
    const T* bias = static_cast<const T*>(args.bias);
    const bool by_channel = args.up.by_channel, accumulate = kAll && args.accumulate;
    uint32_t lhs[kTiles][4];
    float row_factor[kTiles][2], row_mask[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      this->operand(t, true, lhs[t], row_factor[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + row_of(t, half);
        row_factor[t][half] *= float(args.scaling);
        row_mask[t][half] =
            kMerges && kAll && args.row_mask != nullptr && row < args.M ? args.row_mask[row] : 1.f;
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
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t column = column_of(step, s);
        if constexpr (kAll)
          mask[s].load(args.column_mask + column, args.column_mask != nullptr && column < args.E);
        if constexpr (kShifts) {
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
            [[maybe_unused]] uint32_t words[4];
            if constexpr (kDropOut) draws.draw(static_cast<uint32_t>(column / 8), row, words);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              float& value = result[j];
              value = sum[j / 2][half * 2 + j % 2] * row_factor[t][half];
              if constexpr (kDropOut) {
                if (!draws.keeps(words, j)) value = 0.f;
              }
              if constexpr (kShifts) value += widen(reinterpret_cast<const T*>(shift[s].pair)[j]);
              if constexpr (kAll) {
                if (accumulate) value += widen(reinterpret_cast<const T*>(old.pair)[j]);
                const bool pruned = mask[s].at[j] == 0.f || row_mask[t][half] == 0.f;
                value = pruned ? 0.f : value * mask[s].at[j] * row_mask[t][half];
              }
              if (kMerges && kAll && args.not_finite != nullptr) bad |= !isfinite(widen(narrow<T>(value)));
            }
            if (column < args.E && row < args.M && (!kMerges || !kAll || args.not_finite == nullptr)) {
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
    if (kMerges && kAll && args.not_finite != nullptr && bad)
      *args.not_finite = 1;  // every writer writes the same
  }

  __device__ __forceinline__ void run() {
    if (args.x == nullptr) {
      this->read(args.low, args.low_dtype);
    } else if (args.mask != nullptr) {
      down<true>();
    } else {
      down<false>();
    }
    if (args.out == nullptr) return;
    const bool all = args.accumulate || args.column_mask != nullptr || args.row_mask != nullptr ||
                     args.not_finite != nullptr;
    if (all) {
      up<Adds::kAll>();
    } else if (kHasBias && args.bias != nullptr) {
      up<Adds::kBias>();
    } else {
      up<Adds::kNothing>();
    }
  }
};

constexpr int kQueueBytes = kStages * kPieces * kThreads * 16;
constexpr int kSharedBytes = kQueueBytes + LowRows<__half, kMostRows / 16>::kBytes;

template <class T, bool kDropX, bool kDropOut>
__global__ void __launch_bounds__(kThreads, 2) apt_low_rank(const __grid_constant__ LowRankArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  if (args.unless != nullptr && *args.unless != 0) return;
  if (args.rows == 32) {
    Block<T, 2, kDropX, kDropOut>(args, memory, memory + kQueueBytes).run();
  } else {
    Block<T, 1, kDropX, kDropOut>(args, memory, memory + kQueueBytes).run();
  }
}

template <class T, bool kDropX, bool kDropOut>
void launch(const LowRankArgs& args, cudaStream_t stream) {
  allow_shared<&apt_low_rank<T, kDropX, kDropOut>>(kSharedBytes);
  dim3 grid(static_cast<unsigned>((args.M + args.rows - 1) / args.rows),
            static_cast<unsigned>(args.column_splits));
  apt_low_rank<T, kDropX, kDropOut><<<grid, kThreads, kSharedBytes, stream>>>(args);
  check_launch("apt_low_rank");
}

}  // namespace

void low_rank(const LowRankArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.drop_x.rng != nullptr) return launch<T, true, false>(args, queue);
    if (args.drop_out.rng != nullptr) return launch<T, false, true>(args, queue);
    launch<T, false, false>(args, queue);
  });
}

}  // namespace apt::cuda
