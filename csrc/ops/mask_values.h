// Compare the values of masks on the host in each forward: a write that torch does not count shows nowhere
// else. Masks are vectors of float32 on the CPU; others are refused.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace apt {

// Return true if every entry is 1; true for none.
bool all_ones(const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second);

// Return true if both pairs hold equal values.
bool same_masks(const at::Tensor& first, const at::Tensor& first_before, const at::Tensor& second,
                const at::Tensor& second_before);

}  // namespace apt
