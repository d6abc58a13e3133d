#pragma once

#include "../tensor.h"

namespace apt {

// Scale matrix [rows, cols] by a mask along `dim` (0: one value a row), zeros selected. select_only:
// fractions do not scale. Without a mask the matrix itself comes back.
Tensor mask_channels(const Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only);

// The same with another number of rows and columns: cut, or filled with zeros. Always a new contiguous
// matrix.
Tensor mask_channels_resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask,
                             int64_t dim, bool select_only);

// The same in place.
void mask_channels_(Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only);

}  // namespace apt
