#pragma once

#include "../operands.h"

namespace apt {

// Merge the factors into the weight in place. With `check` a result that is not finite leaves it unchanged,
// and throws.
void merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
            const OptTensor& mask_in, const OptTensor& mask_out, bool check);

}  // namespace apt
