#include "mask_values.h"

#include "../checks.h"

namespace apt {
namespace {

void check_host_mask(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.is_cpu() && mask.scalar_type() == at::kFloat && mask.dim() == 1,
                   "mask must be a vector of float32 on the CPU, got ", name_of(mask.scalar_type()),
                   " of shape ", text(mask.sym_sizes()), " on ", mask.device().str());
}

// Compare the values of a mask with those of a function. Without a branch, so that the loop is vectorised.
template <class Value>
bool equals(const Tensor& mask, Value value) {
  const float* values = mask.const_data_ptr<float>();
  const int64_t size = mask.size(0), stride = mask.stride(0);
  int others = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) others |= values[i] != value(i);
  } else {
    for (int64_t i = 0; i < size; ++i) others |= values[i * stride] != value(i);
  }
  return others == 0;
}

bool is_ones(const OptTensor& mask) {
  if (!mask.has_value()) return true;
  check_host_mask(*mask);
  return equals(*mask, [](int64_t) { return 1.f; });
}

bool are_equal(const Tensor& mask, const Tensor& before) {
  check_host_mask(mask);
  check_host_mask(before);
  if (mask.size(0) != before.size(0)) return false;
  const float* old = before.const_data_ptr<float>();
  const int64_t stride = before.stride(0);
  return stride == 1 ? equals(mask, [=](int64_t i) { return old[i]; })
                     : equals(mask, [=](int64_t i) { return old[i * stride]; });
}

}  // namespace

bool all_ones(const OptTensor& first, const OptTensor& second) { return is_ones(first) && is_ones(second); }

bool same_masks(const Tensor& first, const Tensor& first_before, const Tensor& second,
                const Tensor& second_before) {
  return are_equal(first, first_before) && are_equal(second, second_before);
}

}  // namespace apt
