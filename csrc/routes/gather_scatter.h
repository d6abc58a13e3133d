// Gather the kept channels of a side from a full-size matrix, and scatter them back into one.
#pragma once

#include "../tensor.h"

namespace apt {

// One side of a compacted layer whose operand is full-size.
struct KeptSide {
  Tensor index, position;  // int32 [at least width], [size], as in backend.h
  OptTensor mask;          // [size], or none where the kept channels are as they are
  int64_t size, width;     // width: of the kept channels and what pads them
};

// A product with a low-rank factor that a staged pass (backend.h) makes on the way.
struct GatheredLow {
  Tensor low;   // [M, R], written
  Tensor down;  // [R, width], contiguous and aligned
};
struct ScatteredLow {
  Tensor low;  // [M, R] contiguous
  Tensor up;   // [size, R], contiguous and aligned
  double scaling;
};

// Return matrix[:, index] for the first `width` entries of index, with zeros where the index is -1.
Tensor gathered(const Tensor& matrix, const Tensor& index, int64_t width);

// Return a side's kept channels [M, width] of x [M, size], under its mask.
Tensor gathered(const Tensor& x, const KeptSide& side, const std::optional<GatheredLow>& low = std::nullopt);

// Return them in their places [M, size], with the bias [size], under the side's mask, and zeros in pruned
// channels.
Tensor scattered(const Tensor& values, const KeptSide& side, const OptTensor& bias = std::nullopt,
                 const std::optional<ScatteredLow>& low = std::nullopt);

// Return true if rows of so many columns can be gathered and scattered through shared memory (staged).
bool can_stage(const Tensor& x, int64_t columns);

// Return the matrix with rows of whole 16 bytes at aligned addresses, copied only if need be.
Tensor aligned_rows(const Tensor& matrix);

// Return the tensor in this dtype, contiguous at an aligned address, copied only if need be.
Tensor aligned_contiguous(const Tensor& tensor, at::ScalarType dtype);
OptTensor aligned_contiguous(const OptTensor& tensor, at::ScalarType dtype);

}  // namespace apt
