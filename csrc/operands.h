// What every op does to its operands between its checks and its arithmetic.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceGuard.h>

#include <limits>
#include <optional>
#include <vector>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline std::vector<c10::SymInt> with_last(const Tensor& x, const c10::SymInt& last) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = last;
  return sizes;
}

// t leaves float16, whose range a low-rank activation can exceed although y does not.
inline at::TensorOptions low_rank_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type());
}

// A view is a dispatched call, so matrices are taken as they are.
inline Tensor flat(const Tensor& x) {
  if (x.dim() == 2) return x;
  int64_t columns = x.size(-1), rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  return x.reshape({rows, columns});
}

// cuBLAS counts the distance between rows in 32 bits; rows farther apart than that are few, and copied.
inline Tensor reachable(const Tensor& matrix) {
  constexpr int64_t kFarthest = std::numeric_limits<int32_t>::max();
  bool far = matrix.is_cuda() && (matrix.stride(0) >= kFarthest || matrix.stride(1) >= kFarthest);
  return far ? matrix.contiguous() : matrix;
}

inline OptTensor reachable(const OptTensor& matrix) {
  return matrix.has_value() ? OptTensor(reachable(*matrix)) : std::nullopt;
}

// Kernels run on the tensors' device, and the products inside an op are not autocast a second time.
struct Scope {
  explicit Scope(const Tensor& tensor)
      : device(tensor.is_cuda() ? std::optional(tensor.device()) : std::nullopt) {}
  c10::OptionalDeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace apt
