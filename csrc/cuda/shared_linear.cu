// The narrow products of several layers that read the same x, for all their ranks together:
//
//   down        low [M, R] = x A^T of every layer, x read once
//   up          out [M, C] = accumulate * out + scaling * (the sum of low A over the layers)
//   token sums  partial [R, C] = sum over a span of tokens of low[m, r] x[m, c] of every layer, x read once
//
// The same lanes hold the same entries, and a sum over channels has the same order, as in low_rank.cu: `low`
// is the same to the bit. Here there are no masks, no bias and only factors by rank, so that four tiles of 8
// ranks fit where there two do. See there for how fragments and columns are numbered.
#include "../backend.h"
#include "low_rows.cuh"
#include "pipeline.cuh"
#include "tile.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = kRowThreads, kSplits = kRowWarps;
constexpr int kStep = 64;    // columns a warp does at a time
constexpr int kPieces = 12;  // of 16 bytes that a thread needs a step: 4 for 16 rows, 4 for 16 ranks
constexpr int kStages = 2;
constexpr int kWidePitch = 8 * kRankTiles + 8;  // elements between rows of ranks in shared memory
constexpr int kQueueBytes = kStages * kPieces * kThreads * 16;

// A block owns 16 * kTiles rows, and its warps divide the columns. Tiles of ranks come in pairs.
template <class T, int kTiles, int kPairs>
struct Rows : LowRows<T, kTiles> {
  using Base = LowRows<T, kTiles>;
  using Base::g, Base::q, Base::split, Base::row0, Base::row_of, Base::thread;
  static constexpr int kRows = Base::kRows;
  static constexpr int kFactorPiece = 4 * kTiles;
  static_assert(kFactorPiece + 4 * kPairs <= kPieces);

  const SharedRanksArgs& args;
  Queue<kStages, kPieces, kThreads> queue;

  __device__ __forceinline__ Rows(const SharedRanksArgs& args, unsigned char* memory)
      : Base(memory, int64_t{gridDim.x - 1 - blockIdx.x} * kRows, args.M, 0), args(args), queue{memory} {}

  __device__ __forceinline__ int64_t column_of(int step, int s) const {
    return int64_t{step} * kStep + s * 32 + q * 8;
  }
  __device__ __forceinline__ static int row_piece(int s, int t, int half) {
    return (s * kTiles + t) * 2 + half;
  }
  __device__ __forceinline__ static int factor_piece(int s, int pair, int n) {
    return kFactorPiece + (pair * 2 + s) * 2 + n;
  }

  __device__ __forceinline__ void push_rows(int stage, int step, const T* matrix, int64_t stride) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + row_of(t, half);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const int64_t column = column_of(step, s);
          queue.push(stage, row_piece(s, t, half), matrix + row * stride + column, matrix,
                     row < args.M && column < args.C);
        }
      }
    }
  }

  // This lane's row of a tile of ranks, or null where the tile has no such row.
  __device__ __forceinline__ const T* factor_row(int tile, int row) const {
    const RankTile& ranks = args.tile[tile];
    return row < ranks.count ? static_cast<const T*>(ranks.factor) + row * args.C : nullptr;
  }

  __device__ __forceinline__ void push_factor(int stage, int step, const T* const (&from)[kPairs][2]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int64_t column = column_of(step, s);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          queue.push(stage, factor_piece(s, pair, n), from[pair][n] + column, args.x,
                     from[pair][n] != nullptr && column < args.C);
        }
      }
    }
  }

  __device__ __forceinline__ void down() {
    const T* factor[kPairs][2];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int n = 0; n < 2; ++n) factor[pair][n] = factor_row(pair * 2 + n, g);
    }
    float sum[kPairs][kTiles][2][4] = {};
    auto fill = [&](int step, int stage) {
      push_rows(stage, step, static_cast<const T*>(args.x), args.x_stride);
      push_factor(stage, step, factor);
    };
    auto body = [&](int, int stage) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        Eight values[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) values[t][half] = queue.pop(stage, row_piece(s, t, half));
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const Eight rhs = queue.pop(stage, factor_piece(s, pair, n));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                const uint32_t lhs[4] = {values[t][0].pair[2 * h], values[t][1].pair[2 * h],
                                         values[t][0].pair[2 * h + 1], values[t][1].pair[2 * h + 1]};
                multiply<T>(sum[pair][t][n], lhs, rhs.pair[2 * h], rhs.pair[2 * h + 1]);
              }
            }
          }
        }
      }
    };
    queue.run(split, static_cast<int>((args.C + kStep - 1) / kStep), kSplits, fill, [](int) {}, body);
    __syncthreads();  // all queues are free
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      this->add_splits(sum[pair], queue.memory);
      if (split == 0) keep(sum[pair], pair);
    }
  }

  __device__ __forceinline__ void keep(const float (&sum)[kTiles][2][4], int pair) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const RankTile& ranks = args.tile[pair * 2 + n];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = row0 + row_of(t, i / 2);
          const int r = q * 2 + i % 2;
          if (r >= ranks.count || row >= args.M) continue;
          const int64_t at = row * ranks.low_stride + r;
          if (args.low_dtype == DType::kFloat32) {
            static_cast<float*>(ranks.low)[at] = sum[t][n][i];
          } else {
            static_cast<T*>(ranks.low)[at] = narrow<T>(sum[t][n][i]);
          }
        }
      }
    }
  }

  // The ranks of this block's rows in 16 bits, zeros behind those of a tile; a row that would not fit float16
  // is divided by a power of two.
  __device__ __forceinline__ void read(T* low, float* row_scale) const {
    constexpr int kBringing = kThreads / kRows, kBrought = 16 * kPairs / kBringing;
    const int own = thread / kBringing;
    const int64_t row = row0 + own;
    float value[kBrought], largest = 0.f;
#pragma unroll
    for (int i = 0; i < kBrought; ++i) {
      const int slot = thread % kBringing + i * kBringing, r = slot % 8;
      const RankTile& ranks = args.tile[slot / 8];
      const int64_t at = row * ranks.low_stride + r;
      value[i] = r >= ranks.count || row >= args.M   ? 0.f
                 : args.low_dtype == DType::kFloat32 ? static_cast<const float*>(ranks.low)[at]
                                                     : widen(static_cast<const T*>(ranks.low)[at]);
      largest = fmaxf(largest, fabsf(value[i]));
    }
    float divisor = 1.f;
    if constexpr (std::is_same_v<T, __half>) {
      for (int step = kBringing / 2; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      divisor = half_divisor(largest);
    }
#pragma unroll
    for (int i = 0; i < kBrought; ++i)
      low[own * kWidePitch + thread % kBringing + i * kBringing] = narrow<T>(value[i] / divisor);
    if (thread % kBringing == 0) row_scale[own] = divisor;
    __syncthreads();
  }

  __device__ __forceinline__ void up(T* low, float* row_scale) {
    read(low, row_scale);
    T* out = static_cast<T*>(args.out);
    const T* factor[kPairs][2];
    uint32_t lhs[kPairs][kTiles][4];
    float row_factor[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(t, half);
        row_factor[t][half] = row_scale[row] * float(args.scaling);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const T* ranks = low + row * kWidePitch + pair * 16 + 4 * q;
          lhs[pair][t][half] = *reinterpret_cast<const uint32_t*>(ranks);
          lhs[pair][t][2 + half] = *reinterpret_cast<const uint32_t*>(ranks + 2);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int rank = g / 2 * 4 + p * 2 + g % 2;
        factor[pair][p] = factor_row(pair * 2 + rank / 8, rank % 8);
      }
    }
    auto fill = [&](int step, int stage) {
      if (args.accumulate) push_rows(stage, step, out, args.C);
      push_factor(stage, step, factor);
    };
    auto body = [&](int step, int stage) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int64_t column = column_of(step, s);
        uint32_t rhs[kPairs][4][2];
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const Eight eight = queue.pop(stage, factor_piece(s, pair, p));
#pragma unroll
            for (int j = 0; j < 4; ++j) rhs[pair][j][p] = transposed(eight.pair[j]);
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float sum[4][4] = {};
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
            for (int j = 0; j < 4; ++j) multiply<T>(sum[j], lhs[pair][t], rhs[pair][j][0], rhs[pair][j][1]);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + row_of(t, half);
            Eight old;
            if (args.accumulate) old = queue.pop(stage, row_piece(s, t, half));
            float result[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              result[j] = sum[j / 2][half * 2 + j % 2] * row_factor[t][half];
              if (args.accumulate) result[j] += widen(reinterpret_cast<const T*>(old.pair)[j]);
            }
            if (column < args.C && row < args.M) {
              store_words(out + row * args.C + column, two<T>(result[0], result[1]),
                          two<T>(result[2], result[3]), two<T>(result[4], result[5]),
                          two<T>(result[6], result[7]));
            }
          }
        }
      }
    };
    queue.run(
        int(blockIdx.y) * kSplits + split, static_cast<int>((args.C + kStep - 1) / kStep),
        int(gridDim.y) * kSplits, fill, [](int) {}, body);
  }
};

template <class T, int kTiles, int kPairs>
__global__ void __launch_bounds__(kThreads, 2) apt_shared_down(const __grid_constant__ SharedRanksArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  Rows<T, kTiles, kPairs>(args, memory).down();
}

constexpr int kUpBytes = kQueueBytes + 32 * (kWidePitch * 2 + 4);

template <class T, int kTiles, int kPairs>
__global__ void __launch_bounds__(kThreads, 2) apt_shared_up(const __grid_constant__ SharedRanksArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* low = reinterpret_cast<T*>(memory + kQueueBytes);
  Rows<T, kTiles, kPairs>(args, memory).up(low, reinterpret_cast<float*>(low + 16 * kTiles * kWidePitch));
}

// As token_sums.cu does for one layer.
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

template <class T, int kTiles, int kPairs>
void launch_down(const SharedRanksArgs& args, cudaStream_t stream) {
  allow_shared<&apt_shared_down<T, kTiles, kPairs>>(kQueueBytes);
  const dim3 grid(static_cast<unsigned>((args.M + 16 * kTiles - 1) / (16 * kTiles)));
  apt_shared_down<T, kTiles, kPairs><<<grid, kThreads, kQueueBytes, stream>>>(args);
  check_launch("apt_shared_down");
}

template <class T, int kTiles, int kPairs>
void launch_up(const SharedRanksArgs& args, cudaStream_t stream) {
  allow_shared<&apt_shared_up<T, kTiles, kPairs>>(kUpBytes);
  const dim3 grid(static_cast<unsigned>((args.M + 16 * kTiles - 1) / (16 * kTiles)),
                  static_cast<unsigned>(args.column_splits));
  apt_shared_up<T, kTiles, kPairs><<<grid, kThreads, kUpBytes, stream>>>(args);
  check_launch("apt_shared_up");
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

void shared_down(const SharedRanksArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.tiles > 2) return launch_down<T, 1, 2>(args, queue);
    args.rows == 32 ? launch_down<T, 2, 1>(args, queue) : launch_down<T, 1, 1>(args, queue);
  });
}

void shared_up(const SharedRanksArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.tiles > 2) return launch_up<T, 1, 2>(args, queue);
    args.rows == 32 ? launch_up<T, 2, 1>(args, queue) : launch_up<T, 1, 1>(args, queue);
  });
}

void shared_token_sums(const SharedRanksArgs& args, Stream stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.tiles > 2 ? launch_sums<T, 2>(args, queue) : launch_sums<T, 1>(args, queue);
  });
}

}  // namespace apt::cuda
