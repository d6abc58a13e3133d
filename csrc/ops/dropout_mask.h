// The mask that apt_linear and compact_linear drop by.
#pragma once

#include "../operands.h"

namespace apt {

// Return bool [shape], true where an element of a low-rank input of this shape [..., K] is kept.
Tensor dropout_mask(c10::SymIntArrayRef shape, double p, const Tensor& rng);

// Refuse a probability, or a state of a generator, that the ops do not take with x.
void check_dropout(double p, const OptTensor& rng, const Tensor& x);

}  // namespace apt
