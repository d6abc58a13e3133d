// Scatter kept channels to their places, zeros in between, with bias and mask; the low-rank product of a
// compacted layer is added on the way. As in gather.cu, one kernel for rows of whole 16 bytes in 16 bits and
// one for the rest.
#include "../backend.h"
#include "low_rows.cuh"
#include "pipeline.cuh"

namespace apt::cuda {
namespace {

// -- any dtype ---------------------------------------------------------------------------------------------

// A thread owns kWidth neighbouring columns of the result, and walks down the rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads) apt_scatter(const __grid_constant__ ScatterArgs args) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (column >= args.E) return;
  int at[kWidth];
  Wide<T> factor[kWidth], shift[kWidth];
  const T* bias = static_cast<const T*>(args.bias);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    factor[j] = mask_at<Wide<T>>(args.mask.data, args.mask.dtype, column + j);
    at[j] = factor[j] == Wide<T>(0) ? -1 : args.position[column + j];
    if (at[j] >= args.kept)
      at[j] = -1;  // positions of other masks than `values` has: a graph replayed after a change
    shift[j] = bias == nullptr || at[j] < 0 ? Wide<T>(0) : widen(bias[column + j]);
  }
  const T* values = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
#pragma unroll 2
  for (int64_t row = blockIdx.y; row < args.M; row += gridDim.y) {
    Packed<T> result;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Wide<T> value = at[j] < 0 ? Wide<T>(0) : widen(values[row * args.kept + at[j]]) + shift[j];
      result.at[j] = narrow<T>(at[j] < 0 ? Wide<T>(0) : value * factor[j]);
    }
    if constexpr (kWidth == kVector<T>) {
      store128(out + row * args.E + column, result);
    } else {
      out[row * args.E + column] = result.at[0];
    }
  }
}

// -- 16 bits, rows of whole 16 bytes -----------------------------------------------------------------------

// A block owns a strip of columns and walks up the rows, so what depends on the column alone is made once.
// The strip's kept channels are neighbours in `values`: they come to shared memory, get their low-rank part,
// mask and bias there, and are then only moved.
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStrip = 512, kRows = 16;  // columns a block owns at most, rows it does at a time
constexpr int kWide = 2;  // columns a thread owns, one store: neighbours in a warp write whole lines
constexpr int kAcross = kStrip / kWide, kRowsEach = kRows * kAcross / kThreads;
constexpr int kStages = 4;  // three on their way while one is at work
constexpr int kSpare = 8;   // zeros in front of a row, for pruned channels
constexpr int kPieces =
    kStrip / 8 + 1;  // of eight kept channels; the first may belong to the strip before as well
constexpr int kKept = kPieces * 8;
constexpr int kPitch = kSpare + kKept + 8;  // eight rows that are read at once spread over the banks
constexpr int kPiecesEach = (kPieces + kWarps - 1) / kWarps;

template <class T>
struct ScatterMemory {
  T values[kStages][kRows][kPitch];
  alignas(16) unsigned char low[LowRows<T, 1>::kBytes];
  float scale[kKept], shift[kKept];  // mask, and bias under the mask
};

// kPlain: neither bias nor mask.
template <class T, bool kLow, bool kPlain>
__global__ void __launch_bounds__(kThreads, 3)
    apt_scatter_rows(const __grid_constant__ ScatterArgs args, int strip) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<ScatterMemory<T>*>(shared);
  LowRows<T, 1> rows(memory.low, 0, args.M, args.R);
  const int thread = threadIdx.x, warp = thread / 32, lane = rows.lane, g = rows.g, q = rows.q;
  const int E = static_cast<int>(args.E), kept = static_cast<int>(args.kept);
  const int begin = blockIdx.x * strip, end = min(begin + strip, E);
  const T* bias = static_cast<const T*>(args.bias);
  const float* mask = static_cast<const float*>(args.mask.data);

  // Of the strip's kept channels all whole pieces. Positions of other masks than `values` has (a graph
  // replayed after a change) may lie beyond it.
  auto before = [&](int column) {
    if (column >= E) return kept;
    const int position = args.position[column];
    return min(position < 0 ? ~position : position, kept);
  };
  const int first = before(begin) & ~7;
  const int pieces = max(0, min((before(end) - first + 7) / 8, kPieces));
  const int column = begin + thread % kAcross * kWide;
  const bool inside = column < end;
  int place_of[kWide];  // of this thread's columns in the strip; negative: pruned
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int at = inside ? args.position[column + j] - first : -1;
    float scale = 1.f, shift = 0.f;
    if constexpr (!kPlain) {
      if (inside && mask != nullptr) scale = mask[column + j];
      if (inside && bias != nullptr) shift = widen(bias[column + j]);
    }
    place_of[j] = at >= 0 && at < pieces * 8 && scale != 0.f ? at : -1;
    if constexpr (!kPlain) {
      if (place_of[j] >= 0) memory.scale[at] = scale, memory.shift[at] = shift * scale;
    }
  }
  // The factor waits in the stage that is filled last until it is in registers.
  T* up = &memory.values[kStages - 1][0][0];
  static_assert(kKept * kMaxRank <= kRows * kPitch && kPitch % 8 == 0);
  if constexpr (kLow) {
    const int R = static_cast<int>(args.R), width = ranks_a_copy(R);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      if (place_of[j] < 0 || thread >= kAcross) continue;
      const T* ranks = static_cast<const T*>(args.up) + (column + j) * args.R;
#pragma unroll 1
      for (int r = 0; r < kMaxRank; r += width)
        copy_ranks(up + place_of[j] * kMaxRank + r, r < R ? ranks + r : ranks, width, r < R);
    }
  }
  commit_copies();

  auto fill = [&](int tile, int stage) {
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i) {
      const int64_t row = int64_t{tile} * kRows + warp + i * kWarps;
      const bool valid = row < args.M;
      const T* from = static_cast<const T*>(args.values) + (valid ? row * args.kept + first : 0);
      T* to = memory.values[stage][warp + i * kWarps] + kSpare;
#pragma unroll
      for (int piece = lane; piece < (kPieces + 31) / 32 * 32; piece += 32)
        if (piece < pieces) copy_async16(to + piece * 8, valid ? from + piece * 8 : from, valid);
    }
  };
  // From the last rows to the first: the product before this wrote the last ones last.
  const int groups = gridDim.y;
  int tile = static_cast<int>((args.M + kRows - 1) / kRows) - 1 - static_cast<int>(blockIdx.y), ahead = tile;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage, ahead -= groups) {
    if (ahead >= 0) fill(ahead, stage);
    commit_copies();
  }
  float low[1];
  uint32_t rhs[kPiecesEach][2];
  if constexpr (kLow) {
    rows.row0 = int64_t{tile} * kRows;
    rows.fetch(args.low, args.low_dtype, low);
    wait_copies<kStages - 1>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPiecesEach; ++i) {
      const int piece = min(warp + i * kWarps, kPieces - 1);
      const auto* ranks = reinterpret_cast<const uint32_t*>(up + (piece * 8 + g) * kMaxRank);
      rhs[i][0] = ranks[q], rhs[i][1] = ranks[q + 4];
    }
    __syncthreads();
  }
  if (thread < kStages * kRows)
    *reinterpret_cast<uint4*>(memory.values[thread / kRows][thread % kRows]) = uint4{0, 0, 0, 0};
  int offset[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) offset[j] = place_of[j] < 0 ? 0 : kSpare + place_of[j];

  const int row_first = thread / kAcross * kRowsEach;
  const uint32_t row_bytes = static_cast<uint32_t>(E) * 2;
  T* out = static_cast<T*>(args.out) + (int64_t{tile} * kRows + row_first) * args.E + column;
  for (int stage = 0; tile >= 0; tile -= groups, ahead -= groups) {
    if constexpr (kLow) rows.place(low);
    wait_copies<kStages - 2>();
    __syncthreads();  // the copies of all are there, and no thread reads the stage before any more
    if (ahead >= 0) fill(ahead, stage == 0 ? kStages - 1 : stage - 1);
    commit_copies();
    auto* values = memory.values[stage];
    if constexpr (kLow || !kPlain) {
      uint32_t lhs[4];
      float factor[2];
      if constexpr (kLow) {
        rows.operand(0, false, lhs, factor);
        factor[0] *= float(args.scaling), factor[1] *= float(args.scaling);
        rows.row0 -= int64_t{groups} * kRows;
        if (tile >= groups) rows.fetch(args.low, args.low_dtype, low);
      }
#pragma unroll
      for (int i = 0; i < kPiecesEach; ++i) {
        const int piece = warp + i * kWarps, mine = piece * 8 + q * 2;
        if (piece >= pieces) break;
        float sum[4] = {};
        if constexpr (kLow) multiply<T>(sum, lhs, rhs[i][0], rhs[i][1]);
        float2 scale, shift;
        if constexpr (!kPlain) {
          scale = *reinterpret_cast<const float2*>(memory.scale + mine);
          shift = *reinterpret_cast<const float2*>(memory.shift + mine);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          auto* at = reinterpret_cast<uint32_t*>(values[rows.row_of(0, half)] + kSpare + mine);
          float2 value = two_of<T>(*at);
          if constexpr (kLow) {
            value.x += sum[half * 2] * factor[half], value.y += sum[half * 2 + 1] * factor[half];
          }
          if constexpr (!kPlain) {
            value.x = value.x * scale.x + shift.x, value.y = value.y * scale.y + shift.y;
          }
          *at = two<T>(value.x, value.y);
        }
      }
      __syncthreads();
    }
    if (inside) {
      const auto* from = reinterpret_cast<const uint16_t*>(values) + row_first * kPitch;
      const int row_end = static_cast<int>(min(args.M - int64_t{tile} * kRows, int64_t{kRows})) - row_first;
      auto move = [&](int row) {
        char* to = reinterpret_cast<char*>(out) + uint64_t{row_bytes} * static_cast<uint32_t>(row);
        *reinterpret_cast<uint32_t*>(to) =
            __byte_perm(from[offset[0] + row * kPitch], from[offset[1] + row * kPitch], 0x5410);
      };
      if (row_end >= kRowsEach) {
#pragma unroll
        for (int row = 0; row < kRowsEach; ++row) move(row);
      } else {
#pragma unroll 1
        for (int row = 0; row < row_end; ++row) move(row);
      }
    }
    out -= groups * kRows * args.E;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
}

template <class T, bool kLow, bool kPlain>
void launch_rows(const ScatterArgs& args, cudaStream_t stream) {
  constexpr int kBytes = sizeof(ScatterMemory<T>);
  static_assert(kBytes <= kStagedBytes);
  const int64_t resident = resident_blocks<&apt_scatter_rows<T, kLow, kPlain>>(kThreads, kBytes);
  const int64_t strips = (args.E + kStrip - 1) / kStrip;
  // Strips of the same width, in whole lines.
  const int strip = static_cast<int>(((args.E + strips - 1) / strips + 63) / 64 * 64);
  const int64_t groups =
      std::clamp<int64_t>(resident / strips, 1, std::min<int64_t>((args.M + kRows - 1) / kRows, 65535));
  const dim3 grid(static_cast<unsigned>((args.E + strip - 1) / strip), static_cast<unsigned>(groups));
  apt_scatter_rows<T, kLow, kPlain><<<grid, kThreads, kBytes, stream>>>(args, strip);
  check_launch("apt_scatter_rows");
}

}  // namespace

void scatter(const ScatterArgs& args, Stream stream) {
  if (args.M == 0 || args.E == 0) return;
  auto queue = static_cast<cudaStream_t>(stream);
  if (args.staged) {
    const bool plain = args.mask.data == nullptr && args.bias == nullptr;
    return visit_sixteen(args.dtype, [&](auto zero) {
      visit_flags(args.low != nullptr, plain, [&](auto low, auto is_plain) {
        launch_rows<decltype(zero), low.value, is_plain.value>(args, queue);
      });
    });
  }
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool vector = args.E % kVector<T> == 0 && is_aligned(args.out);
    const dim3 grid = column_grid(vector ? args.E / kVector<T> : args.E, args.M);
    if (vector) {
      apt_scatter<T, kVector<T>><<<grid, kColumnThreads, 0, queue>>>(args);
    } else {
      apt_scatter<T, 1><<<grid, kColumnThreads, 0, queue>>>(args);
    }
    check_launch("apt_scatter");
  });
}

}  // namespace apt::cuda
