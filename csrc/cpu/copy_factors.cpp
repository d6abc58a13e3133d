// Copy factors or their gradients to another layout on the CPU.
#include <ATen/Parallel.h>

#include "loops.h"

namespace apt::cpu {
namespace {

template <class T>
void copy(const FactorCopy& job) {
  const auto* src = static_cast<const T*>(job.src);
  auto* dst = static_cast<T*>(job.dst);
  const bool masked = job.mask.data != nullptr;
  const auto mask = widened<T>(job.mask, !masked ? 0 : job.mask_of_rows ? job.src_rows : job.src_columns);
  const bool by_column = job.by_column;
  const int64_t inner = by_column ? job.rows : job.columns, outer = by_column ? job.columns : job.rows;
  const int32_t *outer_index = by_column ? job.column_index : job.row_index,
                *inner_index = by_column ? job.row_index : job.column_index;
  const int64_t src_outer = by_column ? job.src_columns : job.src_rows,
                src_inner = by_column ? job.src_rows : job.src_columns;
  const int64_t outer_stride = job.src_stride[by_column], inner_stride = job.src_stride[!by_column];
  const bool outer_masked = job.mask_of_rows != by_column;
  at::parallel_for(0, outer, rows_a_task(inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = outer_index == nullptr ? i : outer_index[i];
      const bool is_row = from >= 0 && from < src_outer;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t at = inner_index == nullptr ? j : inner_index[j];
        T value = T(0);
        if (is_row && at >= 0 && at < src_inner) {
          value = src[from * outer_stride + at * inner_stride];
          if (masked) value = scaled(value, mask[outer_masked ? from : at], job.select_only);
        }
        dst[i * inner + j] = value;
      }
    }
  });
}

}  // namespace

void copy_factors(const FactorCopies& copies, Stream) {
  for (const FactorCopy& job : copies.job) {
    if (job.dst != nullptr) visit(job.dtype, [&](auto zero) { copy<decltype(zero)>(job); });
  }
}

}  // namespace apt::cpu
