// Compare the values of masks on the host in each forward: a write that torch does not count shows nowhere
// else. Masks are vectors of float32 on the CPU; others are refused.
#pragma once

#include "../tensor.h"

namespace apt {

// Return true if every entry is 1; true for none.
bool all_ones(const OptTensor& first, const OptTensor& second);

// Return true if both pairs hold equal values.
bool same_masks(const Tensor& first, const Tensor& first_before, const Tensor& second,
                const Tensor& second_before);

}  // namespace apt
