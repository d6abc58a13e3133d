// Copy two small matrices to other layouts in one launch. A factor is too small for its bytes to count; what
// a launch costs the host does count.
#include "../backend.h"
#include "vector.cuh"

namespace apt::cuda {
namespace {

constexpr int kThreads = 256;

// A thread owns one entry, in the order of dst's memory.
template <class T, class Index>
__device__ __forceinline__ void copy(const FactorCopy& job, Index entry) {
  const Index inner = static_cast<Index>(job.by_column ? job.rows : job.columns);
  const Index outer = entry / inner, within = entry % inner;
  const int64_t i = job.by_column ? within : outer, j = job.by_column ? outer : within;
  const int64_t row = job.row_index == nullptr ? i : job.row_index[i];
  const int64_t column = job.column_index == nullptr ? j : job.column_index[j];
  T value = narrow<T>(0);
  if (row >= 0 && row < job.src_rows && column >= 0 && column < job.src_columns) {
    value = static_cast<const T*>(job.src)[row * job.src_stride[0] + column * job.src_stride[1]];
    if (job.mask.data != nullptr) {
      const int64_t channel = job.mask_of_rows ? row : column;
      value = scaled(value, mask_at<Wide<T>>(job.mask.data, job.mask.dtype, channel), job.select_only);
    }
  }
  static_cast<T*>(job.dst)[entry] = value;
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads) apt_copy_factors(const __grid_constant__ FactorCopies copies) {
  const FactorCopy& job = copies.job[blockIdx.y];
  const Index entry = Index{blockIdx.x} * kThreads + threadIdx.x;
  if (job.dst != nullptr && entry < static_cast<Index>(job.rows * job.columns)) copy<T>(job, entry);
}

void launch(const FactorCopies& copies, DType dtype, cudaStream_t stream) {
  int64_t size = 0;
  for (const FactorCopy& job : copies.job)
    if (job.dst != nullptr) size = std::max(size, job.rows * job.columns);
  const dim3 grid(static_cast<unsigned>((size + kThreads - 1) / kThreads), 2);
  visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_index(size, [&](auto index) {
      apt_copy_factors<T, decltype(index)><<<grid, kThreads, 0, stream>>>(copies);
      check_launch("apt_copy_factors");
    });
  });
}

}  // namespace

void copy_factors(const FactorCopies& copies, Stream stream) {
  const auto &first = copies.job[0], &second = copies.job[1];
  auto queue = static_cast<cudaStream_t>(stream);
  if (first.dst == nullptr || second.dst == nullptr || first.dtype == second.dtype)
    return launch(copies, first.dst == nullptr ? second.dtype : first.dtype, queue);
  launch({{first, {}}}, first.dtype, queue);
  launch({{second, {}}}, second.dtype, queue);
}

}  // namespace apt::cuda
