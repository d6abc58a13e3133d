// The narrow products of several layers that read the same x, for all their ranks together:
//
//   down        low [M, R] = x A^T of every layer, x read once
//   up          out [M, C] = accumulate * out + scaling * (the sum of low A over the layers)
//
// Each layer drops its own of x, and of low A. The sums over tokens are in shared_token_sums.cu.
//
// The same lanes hold the same entries, and a sum over channels has the same order, as in low_rank.cu: `low`
// is the same to the bit. Here there are no masks, no bias and only factors by rank, so that four tiles of 8
// ranks fit where there two do. See there for how fragments and columns are numbered.
#include <algorithm>

#include "../backend.h"
#include "low_rows.cuh"
#include "pipeline.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = kRowThreads, kSplits = kRowWarps;
constexpr int kStep = 64;    // columns a warp does at a time
constexpr int kPieces = 12;  // of 16 bytes that a thread needs a step: 4 for 16 rows, 4 for 16 ranks
constexpr int kStages = 2;
constexpr int kWidePitch = 8 * kRankTiles + 8;  // elements between rows of ranks in shared memory
constexpr int kQueueBytes = kStages * kPieces * kThreads * 16;
constexpr int kSeedBytes = kRankTiles * 16;

// A block owns 16 * kTiles rows, and its warps divide the columns. Tiles of ranks come in pairs. kDrops: a
// kernel of its own, so that what does not draw keeps its registers.
template <class T, int kTiles, int kPairs, bool kDrops>
struct Rows : LowRows<T, kTiles> {
  using Base = LowRows<T, kTiles>;
  using Base::g, Base::q, Base::split, Base::row0, Base::row_of, Base::thread;
  static constexpr int kRows = Base::kRows;
  static constexpr int kFactorPiece = 4 * kTiles;
  static_assert(kFactorPiece + 4 * kPairs <= kPieces);

  const SharedRanksArgs& args;
  Queue<kStages, kPieces, kThreads> queue;
  int64_t (*seeds)[2];  // [kRankTiles], in shared memory

  __device__ __forceinline__ Rows(const SharedRanksArgs& args, unsigned char* memory)
      : Base(memory, int64_t{gridDim.x - 1 - blockIdx.x} * kRows, args.M, 0),
        args(args),
        queue{memory},
        seeds(reinterpret_cast<int64_t (*)[2]>(memory + kQueueBytes)) {
    if constexpr (kDrops) {
      const int tile = thread / 2;
      if (tile < 2 * kPairs && args.tile[tile].dropout.rng != nullptr)
        seeds[tile][thread % 2] = args.tile[tile].dropout.rng[thread % 2];
      __syncthreads();
    }
  }

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

  // `kept` is what a tile reads of `values`; it holds what the tile before read.
  __device__ __forceinline__ void keep_of(int tile, int64_t column, const Eight (&values)[kTiles][2],
                                          Eight (&kept)[kTiles][2]) const {
    const Dropout& dropout = args.tile[tile].dropout;
    if (tile > 0 && dropout.rng == args.tile[tile - 1].dropout.rng) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        kept[t][half].all = values[t][half].all;
        if (dropout.rng == nullptr) continue;
        const Draws draws({seeds[tile], dropout.threshold});
        uint32_t words[4];
        draws.draw(static_cast<uint32_t>(column / 8), row0 + row_of(t, half), words);
        drop_eight(kept[t][half], draws, words);
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
    auto body = [&](int step, int stage) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        Eight values[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int half = 0; half < 2; ++half) values[t][half] = queue.pop(stage, row_piece(s, t, half));
        }
        [[maybe_unused]] Eight kept[kTiles][2];
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            if constexpr (kDrops) keep_of(pair * 2 + n, column_of(step, s), values, kept);
            const Eight(&left)[kTiles][2] = kDrops ? kept : values;
            const Eight rhs = queue.pop(stage, factor_piece(s, pair, n));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                const uint32_t lhs[4] = {left[t][0].pair[2 * h], left[t][1].pair[2 * h],
                                         left[t][0].pair[2 * h + 1], left[t][1].pair[2 * h + 1]};
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

  // Add the products of one tile of ranks after the other, each without what its layer drops of it. In a pair
  // lanes with q < 2 hold the ranks of the first.
  __device__ __forceinline__ void add_kept(float (&sum)[4][4], const uint32_t (&lhs)[kPairs][kTiles][4],
                                           const uint32_t (&rhs)[kPairs][4][2], int t, int64_t column) const {
    uint32_t words[2][4];
    uint32_t threshold = 0;
#pragma unroll
    for (int tile = 0; tile < 2 * kPairs; ++tile) {
      if (args.tile[tile].count == 0) continue;
      const Dropout& dropout = args.tile[tile].dropout;
      if (tile == 0 || dropout.rng != args.tile[tile - 1].dropout.rng) {
        threshold = dropout.rng == nullptr ? 0 : dropout.threshold << 16;
        if (dropout.rng != nullptr) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            Draws({seeds[tile], 0})
                .draw(static_cast<uint32_t>(column / 8), row0 + row_of(t, half), words[half]);
        }
      }
      uint32_t own[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] = q / 2 == tile % 2 ? lhs[tile / 2][t][i] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float part[4] = {};
        multiply<T>(part, own, rhs[tile / 2][j][0], rhs[tile / 2][j][1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // channel 2 j + i % 2 of eight, row g or g + 8
          const uint32_t word = words[i / 2][j];
          if ((i % 2 == 0 ? word << 16 : word) >= threshold) sum[j][i] += part[i];
        }
      }
    }
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
          if constexpr (kDrops) {
            add_kept(sum, lhs, rhs, t, column);
          } else {
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
              for (int j = 0; j < 4; ++j) multiply<T>(sum[j], lhs[pair][t], rhs[pair][j][0], rhs[pair][j][1]);
            }
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

template <class T, int kTiles, int kPairs, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) apt_shared_down(const __grid_constant__ SharedRanksArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  Rows<T, kTiles, kPairs, kDrops>(args, memory).down();
}

constexpr int kDownBytes = kQueueBytes + kSeedBytes;
constexpr int kUpBytes = kDownBytes + 32 * (kWidePitch * 2 + 4);

template <class T, int kTiles, int kPairs, bool kDrops>
__global__ void __launch_bounds__(kThreads, 2) apt_shared_up(const __grid_constant__ SharedRanksArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* low = reinterpret_cast<T*>(memory + kDownBytes);
  Rows<T, kTiles, kPairs, kDrops>(args, memory)
      .up(low, reinterpret_cast<float*>(low + 16 * kTiles * kWidePitch));
}

template <class T, int kTiles, int kPairs, bool kDrops>
void launch_down(const SharedRanksArgs& args, cudaStream_t stream) {
  allow_shared<&apt_shared_down<T, kTiles, kPairs, kDrops>>(kDownBytes);
  const dim3 grid(static_cast<unsigned>((args.M + 16 * kTiles - 1) / (16 * kTiles)));
  apt_shared_down<T, kTiles, kPairs, kDrops><<<grid, kThreads, kDownBytes, stream>>>(args);
  check_launch("apt_shared_down");
}

template <class T, int kTiles, int kPairs, bool kDrops>
void launch_up(const SharedRanksArgs& args, cudaStream_t stream) {
  allow_shared<&apt_shared_up<T, kTiles, kPairs, kDrops>>(kUpBytes);
  const dim3 grid(static_cast<unsigned>((args.M + 16 * kTiles - 1) / (16 * kTiles)),
                  static_cast<unsigned>(args.column_splits));
  apt_shared_up<T, kTiles, kPairs, kDrops><<<grid, kThreads, kUpBytes, stream>>>(args);
  check_launch("apt_shared_up");
}

// Call run<T, tiles of rows, pairs of tiles of ranks, whether something is dropped>.
template <class Run>
void visit_sizes(const SharedRanksArgs& args, Run&& run) {
  const auto drops = [](const RankTile& tile) { return tile.dropout.rng != nullptr; };
  const bool any = std::any_of(args.tile, args.tile + args.tiles, drops);
  visit_sixteen(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto with = [&]<bool kDrops>() {
      if (args.tiles > 2) return run.template operator()<T, 1, 2, kDrops>();
      args.rows == 32 ? run.template operator()<T, 2, 1, kDrops>()
                      : run.template operator()<T, 1, 1, kDrops>();
    };
    any ? with.template operator()<true>() : with.template operator()<false>();
  });
}

}  // namespace

void shared_down(const SharedRanksArgs& args, Stream stream) {
  visit_sizes(args, [&]<class T, int kTiles, int kPairs, bool kDrops>() {
    launch_down<T, kTiles, kPairs, kDrops>(args, static_cast<cudaStream_t>(stream));
  });
}

void shared_up(const SharedRanksArgs& args, Stream stream) {
  visit_sizes(args, [&]<class T, int kTiles, int kPairs, bool kDrops>() {
    launch_up<T, kTiles, kPairs, kDrops>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace apt::cuda
