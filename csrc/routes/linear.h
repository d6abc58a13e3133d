// The arithmetic of apt_linear: W-sized products by ATen (cuBLAS, MKL, oneDNN), masks by our own kernels.
// Everything here is two-dimensional, checked and on one real device.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "plan.h"

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// What forward and backward have in common. x's dtype is the compute dtype.
struct Layer {
  OptTensor weight;             // [N, K]
  OptTensor bias;               // [N]
  Tensor lora_A, lora_B;        // [R, K], [N, R], compute dtype or float32
  OptTensor mask_in, mask_out;  // [K], [N]
  double scaling;
  bool keep_low = true;  // whether forward's t is wanted
};

// x [M, K] -> (y [M, N], t [M, R]); t may be the first columns of rows that are longer
std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Layer& layer);

// grad [M, N], x [M, K], t [M, R] -> dx [M, K], dA [R, K], dB [N, R], db [N]; undefined where not needed
std::array<Tensor, 4> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need);

// One side of a compacted layer whose operand is full-size: its kept lanes are gathered, or scattered back,
// on the way.
struct KeptSide {
  Tensor index, position;  // int32 [at least width], [size], as in backend.h
  OptTensor mask;          // [size], or none where the kept lanes are as they are
  int64_t size, width;     // width: the layer's own, of the kept lanes and what pads them
};

// Which sides of a layer are, if any. The layer is that of the kept lanes, without a mask on these sides.
struct KeptSides {
  const KeptSide *in = nullptr, *out = nullptr;
  Tensor lora_A, lora_B;  // full-size
};

// The route of 16-bit types on CUDA (low_rank_passes.cpp): the same signatures, for a plan that says kPasses. With
// kept sides, x and grad and what comes back are full-size there; the third result is x's kept lanes, and
// passes_backward is given them as x.
std::tuple<Tensor, Tensor, Tensor> passes_forward(const Tensor& x, const Layer& layer, const LinearPlan& plan,
                                                  const KeptSides& kept = {});
std::array<Tensor, 4> passes_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need,
                                      const LinearPlan& plan, const KeptSides& kept = {});
// Whether that route can gather and scatter these sides on the way.
bool passes_fit(const Tensor& x, const LinearPlan& plan, const KeptSides& kept);
// Whether rows of so many columns can be gathered and scattered through shared memory (staged, in backend.h),
// and such rows: of whole 16 bytes at aligned addresses, copied only if need be.
bool can_stage(const Tensor& x, int64_t columns);
Tensor aligned_rows(const Tensor& matrix);
// A vector of this dtype at an aligned address, copied only if need be.
OptTensor aligned_vector(const OptTensor& vector, at::ScalarType dtype);

// The route of widths, and ranks, that are no multiple of 8 (padded.cpp): copies with rows of whole 16 bytes
// go through linear_forward and linear_backward, and what comes back is copied to its own width.
std::tuple<Tensor, Tensor> padded_forward(const Tensor& x, const Layer& layer);
std::array<Tensor, 4> padded_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need);

// t [M, ..] with this rank, larger than its own: the longer rows that it was made in where it has them,
// whatever they hold there (it ends in entries that are cut off), else a copy filled up with zeros.
Tensor low_of_rank(const Tensor& t, int64_t R);

// matrix [rows, cols] scaled by a mask along `dim` (0: one value a row), zeros selected; select_only: only
// the zeros act. Without a mask the matrix itself comes back.
Tensor lanes(const Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only);
// The same with another number of rows and columns: cut, or filled with zeros. Always a new contiguous
// matrix.
Tensor lanes_resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask, int64_t dim,
                     bool select_only);
void lanes_(Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only);

}  // namespace apt
