// The names of tensors, as every file that knows torch uses them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

}  // namespace apt
