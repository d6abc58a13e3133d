#pragma once

#include "../tensor.h"

namespace apt {

// Sum |values| (or values) [..., channels] over the tokens [...] that count: [channels], in float32 (float64
// for float64). What the others hold is not read. For salience; no op: it has no gradient.
Tensor channel_sums(const Tensor& values, const OptTensor& tokens, bool is_signed);

}  // namespace apt
