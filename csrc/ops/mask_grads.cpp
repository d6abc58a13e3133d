#include "mask_grads.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../device.h"

namespace apt {
namespace {

// One launch reads and writes them all, so the order between two views of the same memory would be chance.
void check_disjoint(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks) {
  std::vector<Extent> extents;
  for (const Tensor& grad : grads) extents.push_back(extent(grad));
  std::sort(extents.begin(), extents.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    TORCH_CHECK_VALUE(!extents[i - 1].meets(extents[i]),
                      "grads must be distinct tensors, got two that share memory");
  }
  for (const Tensor& mask : masks) {
    Extent read = extent(mask);
    auto after = std::partition_point(extents.begin(), extents.end(),
                                      [&](auto& grad) { return grad.begin < read.end; });
    TORCH_CHECK_VALUE(after == extents.begin() || !std::prev(after)->meets(read),
                      "masks must not share memory with grads, which mask_grads_ writes");
  }
}

void launch_mask_grads(const std::vector<MaskedGrad>& table, const Tensor& like) {
  Scope scope(like);
  kernels_for(like).mask_grads(table.data(), table.size(), current_stream(like));
}

}  // namespace

void mask_grads_(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims) {
  TORCH_CHECK_VALUE(grads.size() == masks.size() && grads.size() == dims.size(),
                    "grads, masks and dims must have equal lengths, got ", std::to_string(grads.size()), ", ",
                    std::to_string(masks.size()), " and ", std::to_string(dims.size()));
  std::vector<int64_t> wrapped(dims.begin(), dims.end());
  for (size_t i = 0; i < grads.size(); ++i) {
    Indexed grad_name{"grads", i}, mask_name{"masks", i};
    const Tensor &grad = grads[i], &mask = masks[i];
    check_strided(grad, grad_name);
    check_floating(grad, grad_name);
    int64_t dim = dims[i], rank = grad.dim();
    TORCH_CHECK_VALUE(rank >= 1, grad_name, " must have a dimension to mask, got a 0-dimensional tensor");
    TORCH_CHECK_VALUE(-rank <= dim && dim < rank, Indexed{"dims", i}, " must lie in [", std::to_string(-rank),
                      ", ", std::to_string(rank - 1), "] for ", grad_name, " of shape ",
                      text(grad.sym_sizes()), ", got ", std::to_string(dim));
    wrapped[i] = dim < 0 ? dim + rank : dim;
    check_mask(mask, mask_name, "size", grad.sym_size(wrapped[i]), grad, grad_name);
  }
  std::vector<Tensor> used, held;  // held: contiguous masks, alive until the launch
  std::vector<int64_t> along;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].is_meta() || grads[i].numel() == 0) continue;
    check_no_self_overlap(grads[i], Indexed{"grads", i});
    kernels_for(grads[i]);
    used.push_back(grads[i]);
    held.push_back(masks[i].contiguous());
    along.push_back(wrapped[i]);
  }
  check_disjoint(used, held);

  // All that can run out of memory comes before the first write.
  std::vector<std::pair<Tensor, std::vector<MaskedGrad>>> launches;  // one a device
  // Rare: a gradient that is not contiguous takes ATen's passes.
  std::vector<std::pair<Tensor, Tensor>> copies;
  for (size_t i = 0; i < used.size(); ++i) {
    const Tensor &grad = used[i], &mask = held[i];
    if (!grad.is_contiguous()) {
      Scope scope(grad);
      std::vector<int64_t> shape(grad.dim(), 1);
      shape[along[i]] = -1;
      Tensor factor = mask.view(shape);
      copies.emplace_back(grad, at::where(factor == 0, 0, grad * factor).to(grad.scalar_type()));
      continue;
    }
    auto launch = std::find_if(launches.begin(), launches.end(),
                               [&](auto& entry) { return entry.first.device() == grad.device(); });
    if (launch == launches.end()) launch = launches.insert(launch, {grad, {}});
    int64_t inner = 1;
    for (int64_t d = along[i] + 1; d < grad.dim(); ++d) inner *= grad.size(d);
    launch->second.push_back({grad.mutable_data_ptr(), mask.const_data_ptr(), grad.numel(),
                              grad.size(along[i]), inner, dtype_of(grad), dtype_of(mask)});
  }
  for (auto& [grad, masked] : copies) grad.copy_(masked);
  for (auto& [like, table] : launches) launch_mask_grads(table, like);
}

}  // namespace apt
