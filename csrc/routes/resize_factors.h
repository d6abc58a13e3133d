// Small matrices made anew in one launch: what a layer in other widths sees of its factors, and what is left
// of their gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// The matrix [rows, columns] whose row i and column j are row row_index[i] and column column_index[j] of
// another (int32, contiguous; none: i and j), zero where those are negative or the other has no such row or
// column.
struct Remade {
  Tensor from;  // undefined: nothing is asked for
  int64_t rows, columns;
  OptTensor row_index, column_index;
  // Of the other's columns (mask_dim 1) or rows (0), zeros selected; select_only: only the zeros act.
  OptTensor mask;
  int64_t mask_dim = 1;
  bool select_only = false;
  bool by_column = false;  // a column's entries are neighbours in memory, not a row's
};

// Both, on one device; one that asks for nothing new is `from` itself.
std::array<Tensor, 2> remade(const Remade& first, const Remade& second);

}  // namespace apt
