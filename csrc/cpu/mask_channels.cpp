// Scale a matrix by a mask on the CPU, with at::parallel_for: a raw OpenMP region hangs after fork.
#include <ATen/Parallel.h>

#include "loops.h"

namespace apt::cpu {
namespace {

// Without a branch, so that the loop is vectorised. A factor of 0 selects: 0 * NaN never happens.
template <class T>
APT_INLINE void scale_row_body(const T* src, T* dst, const Wide<T>* factor, int64_t count, bool select_only) {
  if (select_only) {
    for (int64_t j = 0; j < count; ++j) dst[j] = factor[j] == 0 ? T(0) : src[j];
  } else {
    for (int64_t j = 0; j < count; ++j) {
      const Wide<T> product = widen(src[j]) * factor[j];
      dst[j] = narrow<T>(factor[j] == 0 ? Wide<T>(0) : product);
    }
  }
}

#define APT_SCALE_ROW(T)                                                                                    \
  APT_CLONES void scale_row(const T* src, T* dst, const Wide<T>* factor, int64_t count, bool select_only) { \
    scale_row_body(src, dst, factor, count, select_only);                                                   \
  }
APT_EACH_TYPE(APT_SCALE_ROW)
#undef APT_SCALE_ROW

}  // namespace

void mask_channels(const MaskChannelsArgs& args, Stream) {
  visit(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.pad_rows + args.pad_cols > 0) {
      std::fill_n(static_cast<T*>(args.dst), (args.rows + args.pad_rows) * (args.cols + args.pad_cols), T(0));
    }
    const auto factor = widened<T>(args.mask, args.along_rows ? args.rows : args.cols);
    const T* src = static_cast<const T*>(args.src);
    T* dst = static_cast<T*>(args.dst);
    const bool dense = args.src_stride[1] == 1 && args.dst_stride[1] == 1 && !args.along_rows;
    at::parallel_for(0, args.rows, rows_a_task(args.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = src + i * args.src_stride[0];
        T* to = dst + i * args.dst_stride[0];
        if (dense) {
          scale_row(from, to, factor.data(), args.cols, args.select_only);
          continue;
        }
        for (int64_t j = 0; j < args.cols; ++j)
          to[j * args.dst_stride[1]] =
              scaled(from[j * args.src_stride[1]], factor[args.along_rows ? i : j], args.select_only);
      }
    });
  });
}

}  // namespace apt::cpu
