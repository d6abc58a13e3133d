#include "resize_factors.h"

#include <ATen/ops/empty.h>

#include "../device.h"

namespace apt {
namespace {

bool is_unchanged(const ResizedFactor& job) {
  const Tensor& from = job.from;
  if (!from.defined()) return true;
  const bool as_it_is = from.size(0) == job.rows && from.size(1) == job.columns &&
                        !job.row_index.has_value() && !job.column_index.has_value() && !job.mask.has_value();
  return as_it_is && (!job.by_column || from.t().is_contiguous());
}

}  // namespace

std::array<Tensor, 2> resize_factors(const ResizedFactor& first, const ResizedFactor& second) {
  std::array<Tensor, 2> out{first.from, second.from}, masks;
  FactorCopies copies{};
  const ResizedFactor* jobs[2] = {&first, &second};
  for (int i = 0; i < 2; ++i) {
    const ResizedFactor& job = *jobs[i];
    if (is_unchanged(job)) continue;
    const Tensor& from = job.from;
    out[i] = job.by_column ? at::empty({job.columns, job.rows}, from.options()).t()
                           : at::empty({job.rows, job.columns}, from.options());
    if (out[i].numel() == 0) continue;
    if (job.mask.has_value()) masks[i] = job.mask->contiguous();
    FactorCopy& copy = copies.job[i];
    copy.src = from.const_data_ptr(), copy.dst = out[i].mutable_data_ptr();
    copy.rows = job.rows, copy.columns = job.columns;
    copy.src_rows = from.size(0), copy.src_columns = from.size(1);
    copy.src_stride[0] = from.stride(0), copy.src_stride[1] = from.stride(1);
    copy.by_column = job.by_column;
    if (job.row_index.has_value()) copy.row_index = job.row_index->const_data_ptr<int32_t>();
    if (job.column_index.has_value()) copy.column_index = job.column_index->const_data_ptr<int32_t>();
    if (masks[i].defined()) copy.mask = {masks[i].const_data_ptr(), dtype_of(masks[i])};
    copy.mask_of_rows = job.mask_dim == 0, copy.select_only = job.select_only;
    copy.dtype = dtype_of(from);
  }
  for (const ResizedFactor* job : jobs) {
    if (!job->from.defined()) continue;
    if (copies.job[0].dst != nullptr || copies.job[1].dst != nullptr)
      kernels_for(job->from).copy_factors(copies, current_stream(job->from));
    break;
  }
  return out;
}

}  // namespace apt
