// Gather the kept channels of a matrix, side by side. Two kernels: one for rows of whole 16 bytes in 16 bits,
// which reads every line once and can multiply with a low-rank factor on the way, and one for whatever else
// there is.
#include "../backend.h"
#include "low_rows.cuh"
#include "pipeline.cuh"

namespace apt::cuda {
namespace {

// -- any dtype, any strides --------------------------------------------------------------------------------

// A thread owns kWidth neighbours of a row of the result, 16 bytes or one, and walks down the rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads) apt_gather(const __grid_constant__ GatherArgs args) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kWidth;
  if (column >= args.kept) return;
  int64_t offset[kWidth];
  Wide<T> factor[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const int at = args.index[column + j];
    offset[j] = at < 0 ? 0 : at * args.x_stride[1];
    factor[j] = at < 0 ? Wide<T>(0) : mask_at<Wide<T>>(args.mask.data, args.mask.dtype, at);
  }
  const T* x = static_cast<const T*>(args.x);
  T* gathered = static_cast<T*>(args.gathered) + column;
#pragma unroll 2
  for (int64_t row = blockIdx.y; row < args.M; row += gridDim.y) {
    const int64_t from = args.row_index == nullptr ? row : args.row_index[row];
    Packed<T> values;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const bool kept = factor[j] != Wide<T>(0) && from >= 0;
      values.at[j] = kept ? scaled(x[from * args.x_stride[0] + offset[j]], factor[j], factor[j] == Wide<T>(1))
                          : narrow<T>(0);
    }
    if constexpr (kWidth == kVector<T>) {
      store128(gathered + row * args.kept, values);
    } else {
      gathered[row * args.kept] = values.at[0];
    }
  }
}

// -- 16 bits, rows of whole 16 bytes -----------------------------------------------------------------------

constexpr int kTiles = 2, kRows = 16 * kTiles;  // of x a block owns, 16 of them each half of its threads
constexpr int kThreads = kTiles * kRowThreads, kWarps = kThreads / 32;
constexpr int kStep = 32 * kRowWarps;  // kept columns a block does at a time: 32 a warp, one a thread
// Columns of x in shared memory for them: enough while two fifths are kept. What lies beyond is read where it
// is.
constexpr int kWindow = 640;
constexpr int kSpare = 8;  // zeros in front of a row, for the indices that pad
constexpr int kPitch =
    kSpare + kWindow;  // a multiple of 8 that is odd in units of 16 bytes: rows spread over the banks
constexpr int kFactorPitch = kStep + 32;  // eight lanes that read 16 bytes at once meet eight different banks

// What a step needs, copied while the one before it is at work.
template <class T>
struct GatherStage {
  T x[kRows][kPitch];
  T down[kMaxRank][kFactorPitch];
  int offset[kStep];   // of each kept column in the window; -1: a zero
  float scale[kStep];  // its mask
};

// The first and the last index of a step, loaded long before anybody looks at them.
struct Ends {
  int first, last;
};

struct Window {
  int begin, width;  // begin is a multiple of 16
};

// Padding comes last: behind a step that ends in it the window goes as far as it can.
__device__ __forceinline__ Window window_of(const Ends& ends, int columns) {
  const int begin = max(ends.first, 0) & ~15, end = ends.last < 0 ? columns : ends.last + 1;
  return {begin, ends.first < 0 ? 0 : min(end - begin, kWindow)};
}

template <class T, bool kMasked, bool kLow>
__global__ void __launch_bounds__(kThreads, 2) apt_gather_rows(const __grid_constant__ GatherArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* stages = reinterpret_cast<GatherStage<T>*>(memory);
  // From the last rows to the first: the product that follows starts with the first.
  const int64_t row0 = int64_t{gridDim.x - 1 - blockIdx.x} * kRows;
  const int warp = threadIdx.x / 32, tile = warp / kRowWarps;
  LowRows<T, 1> rows(memory + 2 * sizeof(GatherStage<T>) + tile * LowRows<T, 1>::kBytes, row0 + tile * 16,
                     args.M, args.R);
  const T* x = static_cast<const T*>(args.x) + row0 * args.x_stride[0];
  const T* down = static_cast<const T*>(args.down);
  T* gathered = static_cast<T*>(args.gathered) + row0 * args.kept;
  const int row_end = static_cast<int>(min(args.M - row0, int64_t{kRows}));
  const int kept = static_cast<int>(args.kept), thread = threadIdx.x;
  const float* mask = static_cast<const float*>(args.mask.data);
  const int lane = rows.lane, split = rows.split, g = rows.g, q = rows.q;
  const int count = (kept + kStep - 1) / kStep;

  auto index_of = [&](int step) {
    const int column = step * kStep + thread;
    return thread < kStep && column < kept ? args.index[column] : -1;
  };
  auto mask_of = [&](int index) { return !kMasked || index < 0 ? 0.f : mask[index]; };
  auto ends_of = [&](int step) {
    const int first = min(step * kStep, kept - 1), last = min(first + kStep, kept) - 1;
    return Ends{args.index[first], args.index[last]};
  };
  auto fill = [&](int step, GatherStage<T>& stage, const Window& window, int index, float scale) {
    const int pieces = (window.width + 7) / 8;
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i) {
      const int row = warp + i * kWarps;
      const bool valid = row < row_end;
      const T* from = x + (valid ? row * args.x_stride[0] + window.begin : 0);
      for (int piece = lane; piece < pieces; piece += 32)
        copy_async16(&stage.x[row][kSpare + piece * 8], valid ? from + piece * 8 : from, valid);
    }
    if constexpr (kLow) {
      static_assert(kMaxRank == kWarps && kStep == 256);
      const int column = step * kStep + lane * 8;
      const bool valid = warp < args.R && column < kept;
      copy_async16(&stage.down[warp][lane * 8], valid ? down + warp * args.kept + column : down, valid);
    }
    if (thread < kStep) {
      stage.offset[thread] = index < 0 ? -1 : index - window.begin;
      if constexpr (kMasked) stage.scale[thread] = scale;
    }
  };

  if (const int i = thread; i < 2 * kRows)
    *reinterpret_cast<uint4*>(stages[i / kRows].x[i % kRows]) = uint4{0, 0, 0, 0};
  float sum[1][2][4] = {};
  // Of the steps that come: the next one's ends, index and mask.
  const int columns = static_cast<int>(args.C);
  Window now = window_of(ends_of(0), columns);
  Ends next = ends_of(1);
  int index = index_of(0);
  fill(0, stages[0], now, index, mask_of(index));
  commit_copies();
  index = index_of(1);
  float scale = mask_of(index);
  for (int step = 0; step < count; ++step) {
    const GatherStage<T>& stage = stages[step % 2];
    wait_copies<0>();
    __syncthreads();  // the copies of all are there, and no thread reads the other stage any more
    const Window following = window_of(next, columns);
    if (step + 1 < count) fill(step + 1, stages[(step + 1) % 2], following, index, scale);
    commit_copies();
    index = index_of(step + 2);
    next = ends_of(step + 2);

    const int column = step * kStep + split * 32 + q * 8;
    const bool inside = column < kept;
    int offset[8];
    Mask8 factor;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int4 four = reinterpret_cast<const int4*>(stage.offset + split * 32 + q * 8)[half];
      offset[4 * half] = four.x, offset[4 * half + 1] = four.y;
      offset[4 * half + 2] = four.z, offset[4 * half + 3] = four.w;
    }
    if constexpr (kMasked) factor.load(stage.scale + split * 32 + q * 8, true);
    Eight values[2];
    auto pick = [&](auto far) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + rows.row_of(0, half);
        const T* near = stage.x[row] + kSpare;
        T* value = reinterpret_cast<T*>(values[half].pair);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if constexpr (far) {
            const T* from = x + (row < row_end ? row : 0) * args.x_stride[0] + now.begin;
            value[j] = offset[j] < now.width ? near[offset[j]] : from[offset[j]];
          } else {
            value[j] = near[offset[j]];
          }
        }
        if constexpr (kMasked) mask_eight<T>(values[half], factor, false);
        if (inside && row < row_end) {
          const auto& pair = values[half].pair;
          store_words(gathered + row * args.kept + column, pair[0], pair[1], pair[2], pair[3]);
        }
      }
    };
    int furthest = offset[0];
#pragma unroll
    for (int j = 1; j < 8; ++j) furthest = max(furthest, offset[j]);
    if (__any_sync(~0u, furthest >= now.width)) {
      pick(std::true_type{});
    } else {
      pick(std::false_type{});
    }
    if constexpr (kLow) {
      // A product's depth is 16 of the 32 columns: slots as in low_rank.cu.
      Eight factor[2];
#pragma unroll
      for (int n = 0; n < 2; ++n)
        factor[n].all = *reinterpret_cast<const uint4*>(&stage.down[n * 8 + g][split * 32 + q * 8]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t lhs[4] = {values[0].pair[2 * h], values[1].pair[2 * h], values[0].pair[2 * h + 1],
                                 values[1].pair[2 * h + 1]};
#pragma unroll
        for (int n = 0; n < 2; ++n)
          multiply<T>(sum[0][n], lhs, factor[n].pair[2 * h], factor[n].pair[2 * h + 1]);
      }
    }
    scale = mask_of(index);
    now = following;
  }
  if constexpr (kLow) {
    __syncthreads();  // no thread reads the stages any more
    rows.add_splits(sum, memory + tile * sizeof(GatherStage<T>));
    if (split == 0) rows.write(sum, /*by_channel=*/false, args.low, args.low_dtype);
  }
}

template <class T, bool kMasked, bool kLow>
void launch_rows(const GatherArgs& args, cudaStream_t stream) {
  constexpr int kBytes = 2 * sizeof(GatherStage<T>) + kTiles * LowRows<T, 1>::kBytes;
  static_assert(kBytes <= kStagedBytes);
  allow_shared<&apt_gather_rows<T, kMasked, kLow>>(kBytes);
  const auto blocks = static_cast<unsigned>((args.M + kRows - 1) / kRows);
  apt_gather_rows<T, kMasked, kLow><<<blocks, kThreads, kBytes, stream>>>(args);
  check_launch("apt_gather_rows");
}

}  // namespace

void gather(const GatherArgs& args, Stream stream) {
  if (args.M == 0 || args.kept == 0) return;
  auto queue = static_cast<cudaStream_t>(stream);
  if (args.staged) {
    return visit_sixteen(args.dtype, [&](auto zero) {
      visit_flags(args.mask.data != nullptr, args.low != nullptr, [&](auto masked, auto low) {
        launch_rows<decltype(zero), masked.value, low.value>(args, queue);
      });
    });
  }
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    // Of a factor one value a thread: there are few, and what takes time is to wait for them.
    const bool wide = args.M * args.kept >= kManyBlocks * kColumnThreads && args.kept % kVector<T> == 0 &&
                      is_aligned(args.gathered);
    const dim3 grid = column_grid(wide ? args.kept / kVector<T> : args.kept, args.M);
    if (wide) {
      apt_gather<T, kVector<T>><<<grid, kColumnThreads, 0, queue>>>(args);
    } else {
      apt_gather<T, 1><<<grid, kColumnThreads, 0, queue>>>(args);
    }
    check_launch("apt_gather");
  });
}

}  // namespace apt::cuda
