// Small matrices made of others on the CPU: a layer's factors in other widths, and their gradients.
#include <ATen/Parallel.h>

#include "kernels.h"
#include "loops.h"

namespace apt {
namespace {

template <class T>
void copy(const MatrixCopy& job) {
  const auto* src = static_cast<const Stored<T>*>(job.src);
  auto* dst = static_cast<Stored<T>*>(job.dst);
  const auto mask = widened<T>(job.mask, job.mask.data == nullptr ? 0
                                         : job.mask_of_rows       ? job.src_rows
                                                                  : job.src_columns);
  const int64_t inner = job.by_column ? job.rows : job.columns,
                outer = job.by_column ? job.columns : job.rows;
  const int32_t *outer_index = job.by_column ? job.column_index : job.row_index,
                *inner_index = job.by_column ? job.row_index : job.column_index;
  const int64_t outer_lanes = job.by_column ? job.src_columns : job.src_rows,
                inner_lanes = job.by_column ? job.src_rows : job.src_columns;
  const int64_t outer_stride = job.src_stride[job.by_column], inner_stride = job.src_stride[!job.by_column];
  const bool outer_masked = job.mask_of_rows != job.by_column;
  at::parallel_for(0, outer, rows_a_task(inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = outer_index == nullptr ? i : outer_index[i];
      const bool is_row = from >= 0 && from < outer_lanes;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t at = inner_index == nullptr ? j : inner_index[j];
        Stored<T> value(0);
        if (is_row && at >= 0 && at < inner_lanes) {
          value = src[from * outer_stride + at * inner_stride];
          if (!mask.empty()) {
            const Wide<T> factor = mask[outer_masked ? from : at];
            if (factor == 0) {
              value = Stored<T>(0);
            } else if (!job.select_only) {
              value = narrow<T>(widen<T>(value) * factor);
            }
          }
        }
        dst[i * inner + j] = value;
      }
    }
  });
}

}  // namespace

void copies(const MatrixCopies& copies, Stream) {
  for (const MatrixCopy& job : copies.job) {
    if (job.dst != nullptr) visit(job.dtype, [&](auto zero) { copy<decltype(zero)>(job); });
  }
}

}  // namespace apt
