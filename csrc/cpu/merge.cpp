// Merge factors into a weight on the CPU.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "loops.h"

namespace apt::cpu {
namespace {

// The magnitude of a value as an integer: larger for larger ones, NaN above Inf. Comparing floats would keep
// loops from being vectorised.
template <class T>
APT_INLINE auto magnitude(T value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<uint16_t>(std::bit_cast<uint16_t>(value) & 0x7fffu);
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<uint64_t>(value) & 0x7fffffffffffffffull;
  } else {
    return std::bit_cast<uint32_t>(value) & 0x7fffffffu;
  }
}

template <class T>
using Magnitude = decltype(magnitude(T{}));

// The value of this magnitude.
template <class T>
double value_of(Magnitude<T> bits) {
  return static_cast<double>(widen(std::bit_cast<T>(bits)));
}

constexpr uint16_t kHalfInf = 0x7c00u, kBFloat16Inf = 0x7f80u;

// The magnitude of Inf.
template <class T>
constexpr Magnitude<T> infinity() {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return kHalfInf;
  } else if constexpr (std::is_same_v<T, BFloat16Bits>) {
    return kBFloat16Inf;
  } else {
    return std::bit_cast<Magnitude<T>>(std::numeric_limits<T>::infinity());
  }
}

// The largest magnitude of `count` adjacent values.
template <class T>
APT_INLINE Magnitude<T> largest_body(const T* values, int64_t count) {
  Magnitude<T> most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, magnitude(values[i]));
  return most;
}

#define APT_LARGEST(T) \
  APT_CLONES Magnitude<T> largest(const T* values, int64_t count) { return largest_body(values, count); }
APT_EACH_TYPE(APT_LARGEST)
#undef APT_LARGEST

// Write weight + delta under both masks, rounded once, to `out`.
template <class T>
APT_INLINE void merged(const T* weight, T* out, const Wide<T>* __restrict__ delta,
                       const Wide<T>* __restrict__ mask_in, Wide<T> mask_out, int64_t count, int64_t stride,
                       int64_t out_stride) {
  for (int64_t k = 0; k < count; ++k) {
    const Wide<T> kept = (widen(weight[k * stride]) + delta[k]) * (mask_in[k] * mask_out);
    out[k * out_stride] = narrow<T>(mask_in[k] == 0 || mask_out == 0 ? Wide<T>(0) : kept);
  }
}

// Merge a row in place, or only say whether every result is finite.
template <class T>
APT_INLINE bool merge_row_body(T* weight, const Wide<T>* delta, const Wide<T>* mask_in, Wide<T> mask_out,
                               int64_t count, int64_t stride, bool write) {
  if (write) {
    merged(weight, weight, delta, mask_in, mask_out, count, stride, stride);
    return true;
  }
  constexpr int64_t kChunk = 512;
  T result[kChunk];
  Magnitude<T> most = 0;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t length = std::min(kChunk, count - start);
    merged(weight + start * stride, result, delta + start, mask_in + start, mask_out, length, stride, 1);
    most = std::max(most, largest_body(result, length));
  }
  return most < infinity<T>();
}

#define APT_MERGE_ROW(T)                                                                               \
  APT_CLONES bool merge_row(T* weight, const Wide<T>* delta, const Wide<T>* mask_in, Wide<T> mask_out, \
                            int64_t count, int64_t stride, bool write) {                               \
    return stride == 1 ? merge_row_body(weight, delta, mask_in, mask_out, count, 1, write)             \
                       : merge_row_body(weight, delta, mask_in, mask_out, count, stride, write);       \
  }
APT_EACH_TYPE(APT_MERGE_ROW)
#undef APT_MERGE_ROW

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return at::kDouble;
    case DType::kFloat32:
      return at::kFloat;
    case DType::kFloat16:
      return at::kHalf;
    default:
      return at::kBFloat16;
  }
}

// What merge works in, in one piece of memory: it allocates nothing itself. Blocks of rows are shared out to
// lanes, a thread each at most, so that threads wait for each other once a weight.
template <class T>
struct Scratch {
  static constexpr int64_t kBlockElements = int64_t{1} << 16;  // 256 KiB of float32 stay in cache until used

  int64_t rows, blocks, lanes;  // of W in a block, blocks in all, how many have a part of delta
  Wide<T>*A, *B, *delta, *mask_in, *mask_out;  // delta: s B A of a block, one a lane
  size_t bytes = 0;

  Scratch(const MergeArgs& args, void* memory)
      : rows(std::clamp<int64_t>(kBlockElements / args.K, 1, args.N)),
        blocks((args.N + rows - 1) / rows),
        lanes(std::clamp<int64_t>(blocks / 4, 1, at::get_num_threads())) {
    auto take = [&](int64_t count) {
      auto* begin =
          memory == nullptr ? nullptr : reinterpret_cast<Wide<T>*>(static_cast<char*>(memory) + bytes);
      bytes += (static_cast<size_t>(count) * sizeof(Wide<T>) + 63) / 64 * 64;
      return begin;
    };
    A = take(args.R * args.K), B = take(args.N * args.R), delta = take(lanes * rows * args.K);
    mask_in = take(args.K), mask_out = take(args.N);
  }
};

template <class Wide>
at::Tensor matrix(Wide* data, int64_t rows, int64_t cols) {
  return at::from_blob(data, {rows, cols}, std::is_same_v<Wide, double> ? at::kDouble : at::kFloat);
}

// Whether W is small enough for every result to be finite, whatever the lanes: one read of W and no product.
// No where it cannot tell.
template <class T>
bool is_surely_finite(const MergeArgs& args, const Scratch<T>& scratch) {
  if (args.stride[1] != 1) return false;
  std::atomic<Magnitude<T>> most{0};
  at::parallel_for(0, args.N, rows_a_task(args.K), [&](int64_t begin, int64_t end) {
    Magnitude<T> own = 0;
    for (int64_t n = begin; n < end; ++n) {
      own = std::max(own, largest(static_cast<const T*>(args.weight) + n * args.stride[0], args.K));
    }
    for (Magnitude<T> seen = most; seen < own && !most.compare_exchange_weak(seen, own);) {
    }
  });
  auto most_of = [](const Wide<T>* values, int64_t count) {
    return value_of<Wide<T>>(largest(values, count));
  };
  const double product =
      static_cast<double>(args.R) * most_of(scratch.A, args.R * args.K) * most_of(scratch.B, args.N * args.R);
  const double grown =
      std::max(1.0, most_of(scratch.mask_in, args.K)) * std::max(1.0, most_of(scratch.mask_out, args.N));
  // Half of the range leaves room for every rounding on the way.
  return (value_of<T>(most) + product) * grown < value_of<T>(infinity<T>() - 1) / 2;
}

}  // namespace

size_t merge_scratch(const MergeArgs& args) {
  size_t bytes = 0;
  visit(args.dtype, [&](auto zero) { bytes = Scratch<decltype(zero)>(args, nullptr).bytes; });
  return bytes;
}

void merge(const MergeArgs& args, Stream) {
  if (args.unless != nullptr && *args.unless != 0) return;
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scratch<T> scratch(args, args.scratch);
    widen_mask<T>(args.mask_in, args.K, scratch.mask_in);
    widen_mask<T>(args.mask_out, args.N, scratch.mask_out);
    // s B A by the library, a block of rows at a time. The combination and its one rounding are ours.
    auto given = [&](const void* data, int64_t rows, int64_t cols) {
      return at::from_blob(const_cast<void*>(data), {rows, cols}, scalar_type_of(args.factor_dtype));
    };
    at::Tensor A = matrix(scratch.A, args.R, args.K), B = matrix(scratch.B, args.N, args.R);
    A.copy_(given(args.lora_A, args.R, args.K));
    B.copy_(given(args.lora_B, args.N, args.R));
    // And not B.mul_, which makes a tensor of the number.
    for (int64_t i = 0; i < args.N * args.R; ++i) scratch.B[i] *= static_cast<Wide<T>>(args.scaling);
    if (args.not_finite != nullptr && is_surely_finite<T>(args, scratch)) return;
    std::atomic<bool> finite{true};
    at::parallel_for(0, scratch.lanes, 1, [&](int64_t first, int64_t last) {
      for (int64_t lane = first; lane < last; ++lane) {
        Wide<T>* delta = scratch.delta + lane * scratch.rows * args.K;
        for (int64_t start = lane * scratch.rows; start < args.N; start += scratch.lanes * scratch.rows) {
          const int64_t count = std::min(scratch.rows, args.N - start);
          at::Tensor block = matrix(delta, count, args.K);
          at::mm_out(block, B.narrow(0, start, count), A);
          for (int64_t n = 0; n < count; ++n) {
            T* row = static_cast<T*>(args.weight) + (start + n) * args.stride[0];
            const bool row_finite =
                merge_row(row, delta + n * args.K, scratch.mask_in, scratch.mask_out[start + n], args.K,
                          args.stride[1], args.not_finite == nullptr);
            if (!row_finite) finite = false;
          }
        }
      }
    });
    if (args.not_finite != nullptr && !finite) *args.not_finite = 1;
  });
}

}  // namespace apt::cpu
