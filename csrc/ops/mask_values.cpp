#include "mask_values.h"

#include "../checks.h"

namespace apt {
namespace {

void check_host_mask(const Tensor& mask) {
  TORCH_CHECK_TYPE(mask.is_cpu() && mask.scalar_type() == at::kFloat && mask.dim() == 1,
                   "mask must be a vector of float32 on the CPU, got ", name_of(mask.scalar_type()),
                   " of shape ", text(mask.sym_sizes()), " on ", mask.device().str());
}

// Without a branch a line of them is compared at once.
bool is_ones(const Tensor& mask) {
  check_host_mask(mask);
  const float* values = mask.const_data_ptr<float>();
  const int64_t size = mask.size(0), stride = mask.stride(0);
  int others = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) others |= values[i] != 1.f;
  } else {
    for (int64_t i = 0; i < size; ++i) others |= values[i * stride] != 1.f;
  }
  return others == 0;
}

bool are_equal(const Tensor& mask, const Tensor& before) {
  check_host_mask(mask);
  check_host_mask(before);
  if (mask.size(0) != before.size(0)) return false;
  const float *values = mask.const_data_ptr<float>(), *old = before.const_data_ptr<float>();
  const int64_t size = mask.size(0), stride = mask.stride(0), old_stride = before.stride(0);
  int others = 0;
  if (stride == 1 && old_stride == 1) {
    for (int64_t i = 0; i < size; ++i) others |= values[i] != old[i];
  } else {
    for (int64_t i = 0; i < size; ++i) others |= values[i * stride] != old[i * old_stride];
  }
  return others == 0;
}

}  // namespace

bool all_ones(const OptTensor& first, const OptTensor& second) {
  return (!first.has_value() || is_ones(*first)) && (!second.has_value() || is_ones(*second));
}

bool same_masks(const Tensor& first, const Tensor& first_before, const Tensor& second,
                const Tensor& second_before) {
  return are_equal(first, first_before) && are_equal(second, second_before);
}

}  // namespace apt
