#pragma once

#include <vector>

#include "../operands.h"

namespace apt {

// Merge the factors into the weight in place. With `check` a result that is not finite leaves it unchanged,
// and throws.
void merge_(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
            const OptTensor& mask_in, const OptTensor& mask_out, bool check);

// Merge every pair of factors into its weight in place, on any devices: all of them, or none where a result
// of one would not be finite, whose index is returned then, else -1. One wait for each device, and none for
// the writes. What can fail for lack of memory does so before the first write. No op: it has no gradient,
// and is for the merge of a whole model.
int64_t merge_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& lora_A,
                  const std::vector<Tensor>& lora_B, const std::vector<double>& scalings,
                  const std::vector<OptTensor>& masks_in, const std::vector<OptTensor>& masks_out);

}  // namespace apt
