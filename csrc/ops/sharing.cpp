#include "sharing.h"

namespace apt {
namespace {

struct Memory {
  const char *begin = nullptr, *end = nullptr;
};

Memory memory_of(const Tensor& tensor) {
  if (!tensor.has_storage() || tensor.layout() != at::kStrided || tensor.is_meta()) return {};
  const auto* start =
      static_cast<const char*>(tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
  if (start == nullptr || tensor.numel() == 0) return {};
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  start += tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  return {start, start + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

}  // namespace

std::vector<int64_t> sharing(const Tensor& tensor, const std::vector<OptTensor>& others) {
  const Memory own = memory_of(tensor);
  std::vector<int64_t> found;
  for (size_t i = 0; i < others.size(); ++i) {
    if (!others[i].has_value()) continue;
    const Tensor& other = *others[i];
    bool meet = other.is_same(tensor);
    if (!meet && own.begin != nullptr) {
      const Memory its = memory_of(other);
      meet = its.begin != nullptr && its.begin < own.end && own.begin < its.end &&
             other.device() == tensor.device();
    }
    if (meet) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

}  // namespace apt
