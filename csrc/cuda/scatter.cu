// Kept lanes back to their places, zeros in between, with bias and mask; the low-rank product of a compacted
// layer is added on the way. As in gather.cu, one kernel for rows of whole 16 bytes in 16 bits and one for
// the rest.
#include "kernels.h"
#include "low_rows.cuh"
#include "queue.cuh"

namespace apt::cuda {
namespace {

// -- any dtype
// ----------------------------------------------------------------------------------------------------

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

// -- 16 bits, rows of whole 16 bytes
// ------------------------------------------------------------------------------

constexpr int kTiles = 2, kRows = 16 * kTiles;  // of out a block owns, 16 of them each half of its threads
constexpr int kThreads = kTiles * kRowThreads, kWarps = kThreads / 32;
constexpr int kStep = 64 * kRowWarps;  // columns of out a block does at a time: 64 a warp
constexpr int kPitch = kStep + 8;      // what of `values` may go there; rows spread over the banks

// What a step needs, copied while the one before it is at work. One column a thread.
template <class T>
struct ScatterStage {
  T values[kRows][kPitch];
  T up[kStep * kRank];  // by channel, in units of eight ranks (unit_of)
  int offset[kStep];    // in bytes, where in a row of `values` the column is; negative: pruned
  float scale[kStep], shift[kStep];
};
static_assert(kStep == kThreads);

// Where a channel's first or second eight ranks are: shuffled so that the eight channels of a fragment (see
// below) lie in different banks.
__device__ __forceinline__ int unit_of(int channel, int half) {
  return (channel * 2 + half) ^ (channel >> 3 & 1) ^ (channel >> 4 & 1) << 2;
}

// kPlain: neither bias nor mask.
template <class T, bool kLow, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) apt_scatter_rows(const __grid_constant__ ScatterArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* stages = reinterpret_cast<ScatterStage<T>*>(memory);
  // From the last rows to the first: the product before this wrote the last ones last.
  const int64_t row0 = int64_t{gridDim.x - 1 - blockIdx.x} * kRows;
  const int warp = threadIdx.x / 32, tile = warp / kRowWarps;
  LowRows<T, 1> rows(memory + 2 * sizeof(ScatterStage<T>) + tile * LowRows<T, 1>::kBytes, row0 + tile * 16,
                     args.M, args.R);
  const T* values = static_cast<const T*>(args.values) + row0 * args.kept;
  const T* up = static_cast<const T*>(args.up);
  const T* bias = static_cast<const T*>(args.bias);
  const float* mask = static_cast<const float*>(args.mask.data);
  T* out = static_cast<T*>(args.out) + row0 * args.E;
  const int row_end = static_cast<int>(min(args.M - row0, int64_t{kRows}));
  const int E = static_cast<int>(args.E), R = static_cast<int>(args.R), thread = threadIdx.x;
  const int lane = rows.lane, split = rows.split, g = rows.g, q = rows.q;
  const int count = (E + kStep - 1) / kStep;

  // Of a thread's column of a step, loaded long before anybody looks at it.
  struct Column {
    int first, position;  // of the step's first column, and of its own
    float scale, shift;
  };
  auto column_of = [&](int step) {
    const int column = step * kStep + thread;
    const bool inside = column < E;
    Column out{args.position[min(step, count - 1) * kStep], inside ? args.position[column] : -1, 1.f, 0.f};
    if constexpr (!kPlain) {
      if (mask != nullptr && inside) out.scale = mask[column];
      if (bias != nullptr && inside) out.shift = widen(bias[column]);
    }
    return out;
  };
  // How many kept lanes come before a step.
  auto before = [&](int position, int step) {
    return step >= count ? static_cast<int>(args.kept)
                         : min(position < 0 ? ~position : position, static_cast<int>(args.kept));
  };
  auto fill = [&](int step, ScatterStage<T>& stage, int begin, int end, const Column& mine) {
    const int first = begin & ~7, pieces = min((end - first + 7) / 8, kPitch / 8);
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i) {
      const int row = warp + i * kWarps;
      const bool valid = row < row_end;
      const T* from = values + (valid ? row * args.kept + first : 0);
      for (int piece = lane; piece < pieces; piece += 32)
        copy_async16(stage.values[row] + piece * 8, valid ? from + piece * 8 : from, valid);
    }
    if constexpr (kLow) {
      const int width = R % 8 == 0 ? 8 : R % 2 == 0 ? 2 : 1, pieces = kRank / width;
#pragma unroll 1  // registers
      for (int i = thread; i < kStep * pieces; i += kThreads) {
        const int channel = i / pieces, r = i % pieces * width;
        const bool valid = step * kStep + channel < E && r < R;
        const T* from = valid ? up + (step * int64_t{kStep} + channel) * R + r : up;
        T* to = stage.up + unit_of(channel, r / 8) * 8 + r % 8;
        if (width == 8) {
          copy_async16(to, from, valid);
        } else if (width == 2) {
          copy_async4(to, from, valid);
        } else {
          *to = valid ? *from : narrow<T>(0);
        }
      }
    }
    // Positions of other masks than `values` has (a graph replayed after a change) may lie beyond it.
    const bool kept = mine.position >= first && mine.position < first + pieces * 8 && mine.scale != 0.f;
    stage.offset[thread] = kept ? (mine.position - first) * 2 : -1;
    if constexpr (!kPlain) stage.scale[thread] = mine.scale, stage.shift[thread] = mine.shift * mine.scale;
  };

  Column next = column_of(0);
  int begin = before(next.first, 0), end = before(column_of(1).first, 1);
  fill(0, stages[0], begin, end, next);
  commit_copies();
  next = column_of(1);
  int behind = column_of(2).first;
  uint32_t lhs[4];
  float row_factor[2];
  if constexpr (kLow) {
    rows.read(args.low, args.low_dtype);
    rows.operand(0, false, lhs, row_factor);
    row_factor[0] *= float(args.scaling), row_factor[1] *= float(args.scaling);
  }
  // Of 32 columns lane (g, q) holds 8q to 8q + 7: four products of 8 columns, the j-th with columns 8q + 2j
  // and 8q + 2j + 1, so its n-th column is 8 (n / 2) + 2j + n % 2. One load of matrices has two of them.
  const int matrix = lane / 8, n = lane % 8;
  const int channel = n / 2 * 8 + matrix / 2 * 2 + n % 2, half_ranks = matrix % 2;
  for (int step = 0; step < count; ++step) {
    const ScatterStage<T>& stage = stages[step % 2];
    wait_copies<0>();
    __syncthreads();  // the copies of all are there, and nobody reads the other stage any more
    begin = end, end = before(behind, step + 2);
    if (step + 1 < count) fill(step + 1, stages[(step + 1) % 2], begin, end, next);
    commit_copies();
    next = column_of(step + 2);
    behind = args.position[min(step + 3, count - 1) * kStep];
#pragma unroll 1  // registers
    for (int s = 0; s < 2; ++s) {
      const int side = split * 64 + s * 32, mine = side + q * 8, column = step * kStep + mine;
      float sum[4][4] = {};
      if constexpr (kLow) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          uint32_t rhs[4];
          load_matrices(rhs, stage.up + unit_of(side + channel + j * 2, half_ranks) * 8);
          multiply<T>(sum[j], lhs, rhs[0], rhs[1]);
          multiply<T>(sum[j + 1], lhs, rhs[2], rhs[3]);
        }
      }
      int offset[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int4 four = reinterpret_cast<const int4*>(stage.offset + mine)[half];
        offset[4 * half] = four.x, offset[4 * half + 1] = four.y;
        offset[4 * half + 2] = four.z, offset[4 * half + 3] = four.w;
      }
      Mask8 scale, shift;
      if constexpr (!kPlain) scale.load(stage.scale + mine, true), shift.load(stage.shift + mine, true);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + rows.row_of(0, half);
        const char* from = reinterpret_cast<const char*>(stage.values[row]);
        float result[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float value = widen(*reinterpret_cast<const T*>(from + max(offset[j], 0)));
          if constexpr (kLow) value += sum[j / 2][half * 2 + j % 2] * row_factor[half];
          if constexpr (!kPlain) value = value * scale.at[j] + shift.at[j];
          result[j] = offset[j] < 0 ? 0.f : value;
        }
        if (column < E && row < row_end)
          store_words(out + row * args.E + column, two<T>(result[0], result[1]), two<T>(result[2], result[3]),
                      two<T>(result[4], result[5]), two<T>(result[6], result[7]));
      }
    }
  }
}

template <class T, bool kLow, bool kPlain>
void launch_rows(const ScatterArgs& args, cudaStream_t stream) {
  constexpr int kBytes = 2 * sizeof(ScatterStage<T>) + kTiles * LowRows<T, 1>::kBytes;
  static_assert(kBytes <= kStagedBytes);
  allow_shared<&apt_scatter_rows<T, kLow, kPlain>>(kBytes);
  const auto blocks = static_cast<unsigned>((args.M + kRows - 1) / kRows);
  apt_scatter_rows<T, kLow, kPlain><<<blocks, kThreads, kBytes, stream>>>(args);
  check_launch("apt_scatter_rows");
}

template <class T>
void launch_rows(const ScatterArgs& args, cudaStream_t stream) {
  const bool plain = args.mask.data == nullptr && args.bias == nullptr;
  if (args.low != nullptr) {
    plain ? launch_rows<T, true, true>(args, stream) : launch_rows<T, true, false>(args, stream);
  } else {
    plain ? launch_rows<T, false, true>(args, stream) : launch_rows<T, false, false>(args, stream);
  }
}

}  // namespace

void scatter(const ScatterArgs& args, Stream stream) {
  if (args.M == 0 || args.E == 0) return;
  auto queue = static_cast<cudaStream_t>(stream);
  if (args.staged) {
    return visit_sixteen(args.dtype, [&](auto zero) { launch_rows<decltype(zero)>(args, queue); });
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
