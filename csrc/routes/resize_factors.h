// Copy LoRA factors or their gradients to padded, gathered or transposed layouts, two per launch.
#pragma once

#include "../tensor.h"

namespace apt {

// A matrix [rows, columns] made of another. Its row i and column j are row row_index[i] and column
// column_index[j] of the other (int32, contiguous; none: i and j), and zero where those are negative or the
// other has no such row or column.
struct ResizedFactor {
  Tensor from;  // undefined: nothing is asked for
  int64_t rows, columns;
  OptTensor row_index, column_index;
  // Of the other's columns (mask_dim 1) or rows (0), zeros selected. select_only: fractions do not scale.
  OptTensor mask;
  int64_t mask_dim = 1;
  bool select_only = false;
  bool by_column = false;  // a column's entries are neighbours in memory, not a row's
};

// Make both, on one device. One that asks for nothing new is `from` itself.
std::array<Tensor, 2> resize_factors(const ResizedFactor& first, const ResizedFactor& second);

}  // namespace apt
