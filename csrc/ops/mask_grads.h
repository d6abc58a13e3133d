#pragma once

#include "../operands.h"

namespace apt {

// Scale each gradient along its dimension by its mask, in place.
void mask_grads_(at::TensorList grads, at::TensorList masks, at::IntArrayRef dims);

}  // namespace apt
