// The CPU's table. Loops over pointers with at::parallel_for (never a raw OpenMP region: those hang after
// fork).
#include "../backend.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "loops.h"

namespace apt {
namespace {

// The two inner loops. A factor of exactly 0 selects, so 0 * NaN never happens.
template <class T>
[[gnu::always_inline]] inline void scale_row_body(const Stored<T>* src, Stored<T>* dst, const Wide<T>* factor,
                                                  int64_t count, bool select_only) {
  if (select_only) {
    for (int64_t j = 0; j < count; ++j) dst[j] = factor[j] == 0 ? Stored<T>(0) : src[j];
  } else {
    for (int64_t j = 0; j < count; ++j) {
      const Wide<T> product = widen<T>(src[j]) * factor[j];
      dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : product);
    }
  }
}

// Whether a stored value is Inf or NaN, in integers: a comparison of floats would keep the loop from being
// vectorised.
template <class T>
[[gnu::always_inline]] inline auto is_not_finite(Stored<T> value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return static_cast<uint16_t>((value & 0x7f80u) == 0x7f80u);
  } else if constexpr (std::is_same_v<T, double>) {
    return uint64_t{(std::bit_cast<uint64_t>(value) & 0x7ff0000000000000ull) == 0x7ff0000000000000ull};
  } else {
    return uint32_t{(std::bit_cast<uint32_t>(Wide<T>(value)) & 0x7f800000u) == 0x7f800000u};
  }
}

// weight + delta under both masks, rounded once, to `out`.
template <class T>
[[gnu::always_inline]] inline void merged(const Stored<T>* weight, Stored<T>* out,
                                          const Wide<T>* __restrict__ delta,
                                          const Wide<T>* __restrict__ mask_in, Wide<T> mask_out,
                                          int64_t count, int64_t stride, int64_t out_stride) {
  for (int64_t k = 0; k < count; ++k) {
    const Wide<T> kept = (widen<T>(weight[k * stride]) + delta[k]) * (mask_in[k] * mask_out);
    out[k * out_stride] = narrow<T>(mask_in[k] == 0 || mask_out == 0 ? Wide<T>(0) : kept);
  }
}

// The same in place, or only whether every result is finite.
template <class T>
[[gnu::always_inline]] inline bool merge_row_body(Stored<T>* weight, const Wide<T>* delta,
                                                  const Wide<T>* mask_in, Wide<T> mask_out, int64_t count,
                                                  int64_t stride, bool write) {
  if (write) {
    merged<T>(weight, weight, delta, mask_in, mask_out, count, stride, stride);
    return true;
  }
  constexpr int64_t kChunk = 512;
  Stored<T> result[kChunk];
  decltype(is_not_finite<T>(result[0])) bad = 0;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t length = std::min(kChunk, count - start);
    merged<T>(weight + start * stride, result, delta + start, mask_in + start, mask_out, length, stride, 1);
    for (int64_t k = 0; k < length; ++k) bad |= is_not_finite<T>(result[k]);
  }
  return bad == 0;
}

// target_clones takes no templates, so each type gets its overload.
#define APT_ROWS(T)                                                                                         \
  APT_CLONES void scale_row(const T* src, T* dst, const Wide<T>* factor, int64_t count, bool select_only) { \
    scale_row_body<T>(reinterpret_cast<const Stored<T>*>(src), reinterpret_cast<Stored<T>*>(dst), factor,   \
                      count, select_only);                                                                  \
  }                                                                                                         \
  APT_CLONES bool merge_row(T* weight, const Wide<T>* delta, const Wide<T>* mask_in, Wide<T> mask_out,      \
                            int64_t count, int64_t stride, bool write) {                                    \
    auto* row = reinterpret_cast<Stored<T>*>(weight);                                                       \
    return stride == 1 ? merge_row_body<T>(row, delta, mask_in, mask_out, count, 1, write)                  \
                       : merge_row_body<T>(row, delta, mask_in, mask_out, count, stride, write);            \
  }
APT_ROWS(double)
APT_ROWS(float)
APT_ROWS(at::Half)
APT_ROWS(at::BFloat16)
#undef APT_ROWS

void lanes(const LanesArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.pad_rows + args.pad_cols > 0) {
      std::fill_n(static_cast<T*>(args.dst), (args.rows + args.pad_rows) * (args.cols + args.pad_cols), T(0));
    }
    auto factor = widened<T>(args.mask, args.along_rows ? args.rows : args.cols);
    const T* src = static_cast<const T*>(args.src);
    T* dst = static_cast<T*>(args.dst);
    bool dense = args.src_stride[1] == 1 && args.dst_stride[1] == 1 && !args.along_rows;
    at::parallel_for(0, args.rows, rows_a_task(args.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = src + i * args.src_stride[0];
        T* to = dst + i * args.dst_stride[0];
        if (dense) {
          scale_row(from, to, factor.data(), args.cols, args.select_only);
          continue;
        }
        for (int64_t j = 0; j < args.cols; ++j) {
          Wide<T> f = factor[args.along_rows ? i : j];
          T value = from[j * args.src_stride[1]];
          to[j * args.dst_stride[1]] = f == 0 ? T(0) : args.select_only ? value : T(Wide<T>(value) * f);
        }
      }
    });
  });
}

void merge(const MergeArgs& args, Stream) {
  if (args.unless != nullptr && *args.unless != 0) return;
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto in = widened<T>(args.mask_in, args.K), out = widened<T>(args.mask_out, args.N);
    // s B A by the library, a block of rows at a time; the combination and its one rounding are ours.
    auto factor_type = args.factor_dtype == DType::kFloat64   ? at::kDouble
                       : args.factor_dtype == DType::kFloat32 ? at::kFloat
                       : args.factor_dtype == DType::kFloat16 ? at::kHalf
                                                              : at::kBFloat16;
    auto wide_type = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
    auto view = [&](const void* data, int64_t rows, int64_t cols) {
      return at::from_blob(const_cast<void*>(data), {rows, cols}, at::TensorOptions(factor_type))
          .to(wide_type);
    };
    at::Tensor A = view(args.lora_A, args.R, args.K), B = view(args.lora_B, args.N, args.R).mul(args.scaling);
    constexpr int64_t kBlockElements = int64_t{1}
                                       << 18;  // 1 MiB of float32 stays in cache between product and use
    int64_t step = std::clamp<int64_t>(kBlockElements / args.K, 1, args.N);
    at::Tensor delta = at::empty({step, args.K}, A.options());
    std::atomic<bool> finite{true};
    for (int64_t start = 0; start < args.N; start += step) {
      int64_t count = std::min(step, args.N - start);
      at::Tensor block = delta.narrow(0, 0, count);
      at::mm_out(block, B.narrow(0, start, count), A);
      const Wide<T>* values = block.const_data_ptr<Wide<T>>();
      T* weight = static_cast<T*>(args.weight) + start * args.stride[0];
      at::parallel_for(0, count, rows_a_task(args.K), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          bool row_finite = merge_row(weight + n * args.stride[0], values + n * args.K, in.data(),
                                      out[start + n], args.K, args.stride[1], args.not_finite == nullptr);
          if (!row_finite) finite = false;
        }
      });
    }
    if (args.not_finite != nullptr && !finite) *args.not_finite = 1;
  });
}

void mask_grads(const MaskedGrad* grads, size_t count, Stream) {
  for (size_t g = 0; g < count; ++g) {
    const MaskedGrad& grad = grads[g];
    visit(grad.dtype, [&](auto zero) {
      using T = decltype(zero);
      auto factor = widened<T>({grad.mask, grad.mask_dtype}, grad.lanes);
      T* data = static_cast<T*>(grad.grad);
      int64_t rows = grad.size / grad.inner;  // runs of one mask value, or (inner 1) rows of `lanes` values
      if (grad.inner == 1) {
        rows = grad.size / grad.lanes;
        at::parallel_for(0, rows, rows_a_task(grad.lanes), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            scale_row(data + i * grad.lanes, data + i * grad.lanes, factor.data(), grad.lanes, false);
          }
        });
      } else {
        at::parallel_for(0, rows, rows_a_task(grad.inner), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Wide<T> f = factor[i % grad.lanes];
            T* run = data + i * grad.inner;
            for (int64_t j = 0; j < grad.inner; ++j) run[j] = f == 0 ? T(0) : T(Wide<T>(run[j]) * f);
          }
        });
      }
    });
  }
}

}  // namespace

const Kernels kCpuKernels{.lanes = &lanes,
                          .merge = &merge,
                          .mask_grads = &mask_grads,
                          .gather = &gather_kept,
                          .scatter = &scatter_kept,
                          .channel_sums = &channel_sums,
                          .copies = &copies};

}  // namespace apt
