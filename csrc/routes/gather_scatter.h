// A side's kept lanes on their way: gathered from a full-size matrix, and scattered back into one.
#pragma once

#include "linear.h"

namespace apt {

// A product with a skinny factor that a staged pass makes along the way (backend.h).
struct GatheredLow {
  Tensor low;   // [M, R], written
  Tensor down;  // [R, width], contiguous and aligned
};
struct ScatteredLow {
  Tensor low;  // [M, R] contiguous
  Tensor up;   // [size, R], contiguous and aligned
  double scaling;
};

// matrix[:, index] for the first `width` entries of index, zeros where the index is -1.
Tensor gathered(const Tensor& matrix, const Tensor& index, int64_t width);
// A side's kept lanes [M, width] of x [M, size], under its mask, zeros selected.
Tensor gathered(const Tensor& x, const KeptSide& side, const std::optional<GatheredLow>& low = std::nullopt);
// Their way back [M, size] with the bias [size], under the side's mask, with zeros in pruned lanes.
Tensor scattered(const Tensor& values, const KeptSide& side, const OptTensor& bias = std::nullopt,
                 const std::optional<ScatteredLow>& low = std::nullopt);

}  // namespace apt
