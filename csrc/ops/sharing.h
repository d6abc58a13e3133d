// Which tensors lie over the same memory, judged by first and last byte. For adapters whose weights are tied.
#pragma once

#include <vector>

#include "../tensor.h"

namespace apt {

// Return the places in `others` of those that share memory with `tensor`, or are it. A tensor without memory
// of its own (none, on meta, fake, sharded, empty, wrapped by a transform) shares none.
std::vector<int64_t> sharing(const Tensor& tensor, const std::vector<OptTensor>& others);

}  // namespace apt
