#include "library.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "../device.h"
#include "mask_channels.h"

namespace apt {
namespace {

// Convert where need be: a conversion that changes nothing is a dispatched call all the same.
Tensor as(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// Multiply to a low-rank result [M, R] in x's dtype, but float32 for float16 (on CUDA only: see
// widened_cpu.h).
Tensor down(const Tensor& lhs, const Tensor& rhs) {
  at::ScalarType dtype = lhs.scalar_type() == at::kHalf ? at::kFloat : lhs.scalar_type();
  if (lhs.numel() == 0 || rhs.numel() == 0)
    return at::zeros({lhs.size(0), rhs.size(1)}, lhs.options().dtype(dtype));
  return dtype == lhs.scalar_type() ? at::mm(lhs, rhs) : at::mm(lhs, rhs, dtype);
}

// A low-rank activation [M, R] and the factor [R, C] that it is multiplied with, in one dtype.
struct LowFactor {
  Tensor low, factor;
  // float16 alone: low is smaller than it should be by a power of two, nearly always 1, and the factor larger
  // by the same, so that neither overflows; that power times the scaling, float32 on the device.
  OptTensor multiplier;
};

// Bring both to this dtype. `low` has it already, or is float32 over float16. An undefined factor stays so.
LowFactor low_factor_of(const Tensor& low, const Tensor& factor, at::ScalarType dtype, double scaling) {
  if (low.scalar_type() == dtype || low.numel() == 0) return {as(low, dtype), factor, std::nullopt};
  Tensor wide = low.contiguous(), used = factor;
  if (used.defined() && !used.is_non_overlapping_and_dense()) used = used.contiguous();
  LowFactor out{at::empty(wide.sizes(), wide.options().dtype(dtype)),
                used.defined() ? at::empty_like(used) : Tensor(), at::empty({1}, wide.options())};
  Tensor largest = at::empty({1}, wide.options().dtype(at::kInt));
  ToHalfArgs args{.count = wide.numel(),
                  .wide = wide.const_data_ptr<float>(),
                  .half = out.low.mutable_data_ptr(),
                  .largest = reinterpret_cast<uint32_t*>(largest.mutable_data_ptr<int32_t>()),
                  .multiplier = out.multiplier->mutable_data_ptr<float>(),
                  .scaling = scaling};
  if (used.defined()) {
    args.factor_count = used.numel();
    args.factor = used.const_data_ptr();
    args.grown = out.factor.mutable_data_ptr();
  }
  kernels_for(wide).to_half(args, current_stream(wide));
  return out;
}

// Return true if the low side should be scaled instead of the product, which is exact for a power of two.
// Where oneDNN multiplies bfloat16, an alpha other than 1 makes a product of low rank slower.
bool scales_exactly(const Tensor& low, double scaling) {
  int exponent = 0;
  return low.is_cpu() && low.scalar_type() == at::kBFloat16 && std::frexp(scaling, &exponent) == 0.5 &&
         scaling > 1.0 && scaling <= 256.0;
}

// Return true if libraries leave out the product: times 0, and with it a NaN in a kept channel.
bool leaves_out(double scaling) { return static_cast<float>(scaling) == 0.f; }

// Compute out = beta out + scaling low factor in place. With beta 0, out is not read.
void up_(Tensor& out, const LowFactor& pair, double scaling, int beta) {
  if (leaves_out(scaling) || scales_exactly(pair.low, scaling)) {
    out.addmm_(pair.low.mul(scaling), pair.factor, beta, 1);
  } else {
    out.addmm_(pair.low, pair.factor, beta, scaling);
  }
}

// Compute x matrix + scaling low factor without a temporary. On CUDA the low-rank part goes first: a dense
// product that adds to it costs nothing more, while a low-rank product that adds to the dense one reads and
// writes all of it once more.
Tensor dense_and_low(const Tensor& x, const Tensor& matrix, const LowFactor& pair, double scaling) {
  if (pair.low.size(1) == 0) return at::mm(x, matrix);
  if (!x.is_cuda()) {
    Tensor out = at::mm(x, matrix);
    up_(out, pair, scaling, 1);
    return out;
  }
  Tensor out = at::empty({x.size(0), matrix.size(1)}, x.options());
  up_(out, pair, scaling, 0);
  return out.addmm_(x, matrix);
}

// Compute multiplier (or else scaling) * lhs rhs in the factor's dtype: the sum over tokens that is its
// gradient.
Tensor factor_grad(const Tensor& lhs, const Tensor& rhs, double scaling, const OptTensor& multiplier,
                   at::ScalarType dtype) {
  if (lhs.numel() == 0 || rhs.numel() == 0)
    return at::zeros({lhs.size(0), rhs.size(1)}, rhs.options().dtype(dtype));
  bool sixteen = rhs.scalar_type() == at::kHalf || rhs.scalar_type() == at::kBFloat16;
  if (sixteen && rhs.is_cuda() && (dtype == at::kFloat || multiplier.has_value())) {
    Tensor wide = at::mm(lhs, rhs, at::kFloat);
    multiplier.has_value() ? wide.mul_(*multiplier) : wide.mul_(scaling);
    return as(wide, dtype);
  }
  if (leaves_out(scaling)) return as(at::mm(lhs, rhs).mul_(scaling), dtype);
  // beta = 0: the fresh memory is not read
  Tensor grad = at::empty({lhs.size(0), rhs.size(1)}, rhs.options());
  grad.addmm_(lhs, rhs, 0, scaling);
  return as(grad, dtype);
}

// Close the gaps between the rows of a view: oneDNN's bfloat16 product may read them, and a NaN there reaches
// the result.
Tensor without_gaps(const Tensor& rows) {
  return rows.is_cpu() && rows.scalar_type() == at::kBFloat16 ? rows.contiguous() : rows;
}

}  // namespace

Tensor output_of(const Tensor& x, const Tensor& t, const Layer& layer) {
  LowFactor pair = low_factor_of(t, as(layer.lora_B, x.scalar_type()).t(), x.scalar_type(), layer.scaling);
  Tensor y;
  if (layer.weight.has_value() && !layer.bias.has_value()) {
    y = dense_and_low(x, layer.weight->t(), pair, layer.scaling);
  } else {
    if (layer.weight.has_value()) {
      y = at::linear(x, *layer.weight, layer.bias);
    } else if (layer.bias.has_value()) {
      y = layer.bias->expand({x.size(0), -1}).clone(at::MemoryFormat::Contiguous);
    } else {
      y = at::zeros({x.size(0), layer.lora_B.size(0)}, x.options());
    }
    if (t.size(1) > 0) up_(y, pair, layer.scaling, 1);
  }
  mask_channels_(y, layer.mask_out, 1, false);
  return y;
}

std::tuple<Tensor, Tensor> library_forward(const Tensor& x, const Layer& layer) {
  Tensor masked = mask_channels(without_gaps(x), layer.mask_in, 1, false);
  // Pruned columns of A are selected too: 0 * NaN is NaN.
  Tensor factor = mask_channels(as(layer.lora_A, x.scalar_type()), layer.mask_in, 1, true);
  Tensor t = down(drop_channels(masked, layer.drop), factor.t());
  return {output_of(masked, t, layer), t};
}

std::array<Tensor, 4> library_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  at::ScalarType dtype = grad.scalar_type();
  std::array<Tensor, 4> out;
  Tensor g = mask_channels(without_gaps(grad), layer.mask_out, 1, false);
  LowFactor u;  // g B [M, R], and A
  if (need_x || need_A) {
    Tensor low = down(g, mask_channels(as(layer.lora_B, dtype), layer.mask_out, 0, true));
    u = low_factor_of(low, need_x ? as(layer.lora_A, dtype) : Tensor(), dtype, layer.scaling);
  }
  if (need_x) {
    Tensor dx;
    if (layer.drop && u.low.size(1) > 0) {
      dx = at::empty({g.size(0), layer.lora_A.size(1)}, g.options());
      up_(dx, u, layer.scaling, 0);
      drop_channels_(dx, layer.drop);
      if (layer.weight.has_value()) dx.addmm_(g, *layer.weight);
    } else if (layer.weight.has_value()) {
      dx = dense_and_low(g, *layer.weight, u, layer.scaling);
    } else {
      dx = at::zeros({g.size(0), layer.lora_A.size(1)}, g.options());
      if (u.low.size(1) > 0) up_(dx, u, layer.scaling, 1);
    }
    mask_channels_(dx, layer.mask_in, 1, false);
    out[0] = dx;
  }
  if (need_A) {
    // From the unmasked x: the mask is the store factor, so a NaN in a pruned channel ends in a pruned
    // column.
    Tensor used = drop_channels(without_gaps(x), layer.drop);
    out[1] = factor_grad(u.low.t(), used, layer.scaling, u.multiplier, layer.lora_A.scalar_type());
    mask_channels_(out[1], layer.mask_in, 1, false);
  }
  if (need_B) {
    LowFactor narrow = low_factor_of(t, Tensor(), dtype, layer.scaling);
    out[2] = factor_grad(g.t(), narrow.low, layer.scaling, narrow.multiplier, layer.lora_B.scalar_type());
    mask_channels_(out[2], layer.mask_out, 0, true);
  }
  if (need_bias) out[3] = g.sum(0);
  return out;
}

}  // namespace apt
