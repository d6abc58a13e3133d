// What masks on the host hold, looked at in each forward: a write that torch does not count shows nowhere
// else. On vectors of float32 on the CPU; others are refused.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace apt {

// Whether every entry is 1. None is.
bool all_ones(const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second);

// Whether both pairs hold equal values.
bool same_masks(const at::Tensor& first, const at::Tensor& first_before, const at::Tensor& second,
                const at::Tensor& second_before);

}  // namespace apt
