// Merge factors into a weight on the CPU.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <atomic>
#include <bit>

#include "loops.h"

namespace apt::cpu {
namespace {

// Nonzero if a value is Inf or NaN. In integers: comparing floats would keep the loop from being vectorised.
template <class T>
APT_INLINE auto is_not_finite(T value) {
  if constexpr (std::is_same_v<T, BFloat16Bits>) {
    return static_cast<uint16_t>((static_cast<uint16_t>(value) & 0x7f80u) == 0x7f80u);
  } else if constexpr (std::is_same_v<T, double>) {
    return uint64_t{(std::bit_cast<uint64_t>(value) & 0x7ff0000000000000ull) == 0x7ff0000000000000ull};
  } else {
    return uint32_t{(std::bit_cast<uint32_t>(widen(value)) & 0x7f800000u) == 0x7f800000u};
  }
}

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
  decltype(is_not_finite(result[0])) bad = 0;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t length = std::min(kChunk, count - start);
    merged(weight + start * stride, result, delta + start, mask_in + start, mask_out, length, stride, 1);
    for (int64_t k = 0; k < length; ++k) bad |= is_not_finite(result[k]);
  }
  return bad == 0;
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

}  // namespace

void merge(const MergeArgs& args, Stream) {
  if (args.unless != nullptr && *args.unless != 0) return;
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto in = widened<T>(args.mask_in, args.K), out = widened<T>(args.mask_out, args.N);
    // s B A by the library, a block of rows at a time. The combination and its one rounding are ours.
    const auto wide_type = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
    auto view = [&](const void* data, int64_t rows, int64_t cols) {
      const at::TensorOptions options(scalar_type_of(args.factor_dtype));
      return at::from_blob(const_cast<void*>(data), {rows, cols}, options).to(wide_type);
    };
    at::Tensor A = view(args.lora_A, args.R, args.K), B = view(args.lora_B, args.N, args.R).mul(args.scaling);
    constexpr int64_t kBlockElements = int64_t{1} << 18;  // 1 MiB of float32 stays in cache until it is used
    const int64_t step = std::clamp<int64_t>(kBlockElements / args.K, 1, args.N);
    at::Tensor delta = at::empty({step, args.K}, A.options());
    std::atomic<bool> finite{true};
    for (int64_t start = 0; start < args.N; start += step) {
      const int64_t count = std::min(step, args.N - start);
      at::Tensor block = delta.narrow(0, 0, count);
      at::mm_out(block, B.narrow(0, start, count), A);
      const Wide<T>* values = block.const_data_ptr<Wide<T>>();
      T* weight = static_cast<T*>(args.weight) + start * args.stride[0];
      at::parallel_for(0, count, rows_a_task(args.K), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          const bool row_finite =
              merge_row(weight + n * args.stride[0], values + n * args.K, in.data(), out[start + n], args.K,
                        args.stride[1], args.not_finite == nullptr);
          if (!row_finite) finite = false;
        }
      });
    }
    if (args.not_finite != nullptr && !finite) *args.not_finite = 1;
  });
}

}  // namespace apt::cpu
