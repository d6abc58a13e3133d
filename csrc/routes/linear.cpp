#include "linear.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>

#include "../device.h"

namespace apt {
namespace {

// A conversion that changes nothing is a dispatched call all the same.
Tensor as(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

// lhs rhs [M, R] with a skinny result: x's dtype, but float32 for float16 (CUDA only; see widened below).
Tensor down(const Tensor& lhs, const Tensor& rhs) {
  at::ScalarType dtype = lhs.scalar_type() == at::kHalf ? at::kFloat : lhs.scalar_type();
  if (lhs.numel() == 0 || rhs.numel() == 0)
    return at::zeros({lhs.size(0), rhs.size(1)}, lhs.options().dtype(dtype));
  return dtype == lhs.scalar_type() ? at::mm(lhs, rhs) : at::mm(lhs, rhs, dtype);
}

// A skinny activation [M, R] and the factor [R, C] that it is multiplied with, in one dtype.
struct Skinny {
  Tensor low, factor;
  // float16 alone: low is smaller than it should be by a power of two, nearly always 1, and the factor larger
  // by the same, so that neither overflows; that power times the scaling, float32 on the device.
  OptTensor multiplier;
};

// `low` is of the dtype given, or float32 over float16 (CUDA only; see widened below). An undefined factor
// stays so.
Skinny skinny_of(const Tensor& low, const Tensor& factor, at::ScalarType dtype, double scaling) {
  if (low.scalar_type() == dtype || low.numel() == 0) return {as(low, dtype), factor, std::nullopt};
  Tensor wide = low.contiguous(), used = factor;
  if (used.defined() && !used.is_non_overlapping_and_dense()) used = used.contiguous();
  Skinny out{at::empty(wide.sizes(), wide.options().dtype(dtype)),
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

// Where oneDNN multiplies bfloat16, an alpha other than 1 makes a skinny product slower; a power of two
// scales the small side exactly instead.
bool scales_exactly(const Tensor& low, double scaling) {
  int exponent = 0;
  return low.is_cpu() && low.scalar_type() == at::kBFloat16 && std::frexp(scaling, &exponent) == 0.5 &&
         scaling > 1.0 && scaling <= 256.0;
}

// Libraries leave out a product times 0, and with it a NaN in a kept lane.
bool leaves_out(double scaling) { return static_cast<float>(scaling) == 0.f; }

// out = beta out + scaling low factor in place. With beta 0, out is not read.
void up_(Tensor& out, const Skinny& skinny, double scaling, int beta) {
  if (leaves_out(scaling) || scales_exactly(skinny.low, scaling)) {
    out.addmm_(skinny.low.mul(scaling), skinny.factor, beta, 1);
  } else {
    out.addmm_(skinny.low, skinny.factor, beta, scaling);
  }
}

// x matrix + scaling low factor, without a temporary. On CUDA the low-rank part goes first: the dense product
// that adds to it costs nothing more, while a low-rank product that adds to the dense one reads and writes
// all of it once more.
Tensor dense_and_low(const Tensor& x, const Tensor& matrix, const Skinny& skinny, double scaling) {
  if (skinny.low.size(1) == 0) return at::mm(x, matrix);
  if (!x.is_cuda()) {
    Tensor out = at::mm(x, matrix);
    up_(out, skinny, scaling, 1);
    return out;
  }
  Tensor out = at::empty({x.size(0), matrix.size(1)}, x.options());
  up_(out, skinny, scaling, 0);
  return out.addmm_(x, matrix);
}

// multiplier (or else scaling) * lhs rhs, the sum over tokens that is the gradient of a factor, in the
// factor's dtype.
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

// dst may have more rows and columns than src: they become zero.
void run_lanes(const Tensor& src, Tensor& dst, const OptTensor& mask, int64_t dim, bool select_only) {
  if (dst.numel() == 0) return;
  OptTensor held = mask.has_value() ? OptTensor(mask->contiguous()) : std::nullopt;
  MaskChannelsArgs args{src.const_data_ptr(),
                        dst.mutable_data_ptr(),
                        src.size(0),
                        src.size(1),
                        dst.size(0) - src.size(0),
                        dst.size(1) - src.size(1),
                        {src.stride(0), src.stride(1)},
                        {dst.stride(0), dst.stride(1)},
                        held.has_value() ? Mask{held->const_data_ptr(), dtype_of(*held)} : Mask{},
                        /*along_rows=*/dim == 0,
                        select_only,
                        dtype_of(src)};
  kernels_for(src).mask_channels(args, current_stream(src));
}

bool has_fast_bfloat16() {
  // oneDNN's own answer: without it ATen's 16-bit product is 4 to 500 times slower than float32.
  static const bool supported = [] {
    auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
    return op.has_value() && op->typed<bool()>().call();
  }();
  return supported && at::globalContext().userEnabledMkldnn();
}

// 16-bit products a CPU does slowly (float16: always, and there t could overflow) run in float32 instead, W
// and its gradient side in blocks of rows, so that the extra memory is a block and not a second W.
bool is_widened(const Tensor& x) {
  return x.is_cpu() &&
         (x.scalar_type() == at::kHalf || (x.scalar_type() == at::kBFloat16 && !has_fast_bfloat16()));
}

int64_t block_rows(int64_t columns) {
  constexpr int64_t kBlockElements = int64_t{1} << 20;  // 4 MiB of float32: stays in a last-level cache
  return std::max<int64_t>(64, kBlockElements / std::max<int64_t>(1, columns));
}

OptTensor rows_of(const OptTensor& tensor, int64_t start, int64_t length,
                  std::optional<at::ScalarType> dtype) {
  if (!tensor.has_value()) return std::nullopt;
  Tensor rows = tensor->narrow(0, start, length);
  return dtype.has_value() ? rows.to(*dtype) : rows;
}

// y = mask_out * (x W^T + s t B^T + b) for x already masked and t already computed
Tensor output_of(const Tensor& x, const Tensor& t, const Layer& layer) {
  Skinny skinny = skinny_of(t, as(layer.lora_B, x.scalar_type()).t(), x.scalar_type(), layer.scaling);
  Tensor y;
  if (layer.weight.has_value() && !layer.bias.has_value()) {
    y = dense_and_low(x, layer.weight->t(), skinny, layer.scaling);
  } else {
    if (layer.weight.has_value()) {
      y = at::linear(x, *layer.weight, layer.bias);
    } else if (layer.bias.has_value()) {
      y = layer.bias->expand({x.size(0), -1}).clone(at::MemoryFormat::Contiguous);
    } else {
      y = at::zeros({x.size(0), layer.lora_B.size(0)}, x.options());
    }
    if (t.size(1) > 0) up_(y, skinny, layer.scaling, 1);
  }
  lanes_(y, layer.mask_out, 1, false);
  return y;
}

std::tuple<Tensor, Tensor> widened_forward(const Tensor& x, const Layer& layer) {
  Tensor wide_x = lanes(x, layer.mask_in, 1, false).to(at::kFloat);
  Tensor factor = lanes(layer.lora_A.to(x.scalar_type()), layer.mask_in, 1, true).to(at::kFloat);
  Tensor t = at::mm(wide_x, factor.t());
  int64_t N = layer.lora_B.size(0), step = block_rows(x.size(1));
  Tensor y = at::empty({x.size(0), N}, x.options());
  for (int64_t start = 0; start < N; start += step) {
    int64_t length = std::min(step, N - start);
    Layer block{rows_of(layer.weight, start, length, at::kFloat),
                rows_of(layer.bias, start, length, at::kFloat),
                Tensor(),
                layer.lora_B.narrow(0, start, length).to(x.scalar_type()).to(at::kFloat),
                std::nullopt,
                rows_of(layer.mask_out, start, length, at::kFloat),
                layer.scaling};
    y.narrow(1, start, length).copy_(output_of(wide_x, t, block));
  }
  return {y, x.scalar_type() == at::kHalf ? t : t.to(x.scalar_type())};
}

std::array<Tensor, 4> widened_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need) {
  // The weight alone stays narrow, and is widened block by block below.
  auto wide = [&](const OptTensor& mask) {
    return mask.has_value() ? OptTensor(mask->to(at::kFloat)) : std::nullopt;
  };
  auto rounded = [&](const Tensor& factor) { return factor.to(x.scalar_type()).to(at::kFloat); };
  Layer low_rank{std::nullopt,        std::nullopt,         rounded(layer.lora_A), rounded(layer.lora_B),
                 wide(layer.mask_in), wide(layer.mask_out), layer.scaling};
  Tensor wide_grad = grad.to(at::kFloat);
  Tensor wide_x = need[1] ? x.to(at::kFloat) : x;
  auto grads = linear_backward(wide_grad, wide_x, t.to(at::kFloat), low_rank, need);
  if (need[0] && layer.weight.has_value()) {
    Tensor g = lanes(wide_grad, low_rank.mask_out, 1, false);
    Tensor dense = at::zeros({g.size(0), layer.weight->size(1)}, g.options());
    int64_t N = g.size(1), step = block_rows(dense.size(1));
    for (int64_t start = 0; start < N; start += step) {
      int64_t length = std::min(step, N - start);
      dense.addmm_(g.narrow(1, start, length), layer.weight->narrow(0, start, length).to(at::kFloat));
    }
    lanes_(dense, low_rank.mask_in, 1, false);
    grads[0].add_(dense);
  }
  if (need[0]) grads[0] = grads[0].to(x.scalar_type());
  if (need[1]) grads[1] = grads[1].to(layer.lora_A.scalar_type());
  if (need[2]) grads[2] = grads[2].to(layer.lora_B.scalar_type());
  if (need[3]) grads[3] = grads[3].to(x.scalar_type());
  return grads;
}

// oneDNN's bfloat16 product may read what lies between the rows of a view, and a NaN there reaches the
// result.
Tensor without_gaps(const Tensor& rows) {
  return rows.is_cpu() && rows.scalar_type() == at::kBFloat16 ? rows.contiguous() : rows;
}

LinearPlan plan_for(const Tensor& x, const Layer& layer) {
  return launch_plan({x.size(0), layer.lora_B.size(0), x.size(1), layer.lora_A.size(0), dtype_of(x)},
                     limits_of(x));
}

std::tuple<Tensor, Tensor> library_forward(const Tensor& x, const Layer& layer) {
  Tensor masked = lanes(without_gaps(x), layer.mask_in, 1, false);
  // Pruned columns of A are selected too: 0 * NaN is NaN.
  Tensor factor = lanes(as(layer.lora_A, x.scalar_type()), layer.mask_in, 1, true);
  Tensor t = down(masked, factor.t());
  return {output_of(masked, t, layer), t};
}

std::array<Tensor, 4> library_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                       const Layer& layer, const std::array<bool, 4>& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  at::ScalarType dtype = grad.scalar_type();
  std::array<Tensor, 4> out;
  Tensor g = lanes(without_gaps(grad), layer.mask_out, 1, false);
  Skinny u;  // g B [M, R], and A
  if (need_x || need_A) {
    Tensor low = down(g, lanes(as(layer.lora_B, dtype), layer.mask_out, 0, true));
    u = skinny_of(low, need_x ? as(layer.lora_A, dtype) : Tensor(), dtype, layer.scaling);
  }
  if (need_x) {
    Tensor dx;
    if (layer.weight.has_value()) {
      dx = dense_and_low(g, *layer.weight, u, layer.scaling);
    } else {
      dx = at::zeros({g.size(0), layer.lora_A.size(1)}, g.options());
      if (u.low.size(1) > 0) up_(dx, u, layer.scaling, 1);
    }
    lanes_(dx, layer.mask_in, 1, false);
    out[0] = dx;
  }
  if (need_A) {
    // From the unmasked x: the mask is the store factor, so a NaN in a pruned lane ends in a pruned column.
    out[1] = factor_grad(u.low.t(), without_gaps(x), layer.scaling, u.multiplier, layer.lora_A.scalar_type());
    lanes_(out[1], layer.mask_in, 1, false);
  }
  if (need_B) {
    Skinny narrow = skinny_of(t, Tensor(), dtype, layer.scaling);
    out[2] = factor_grad(g.t(), narrow.low, layer.scaling, narrow.multiplier, layer.lora_B.scalar_type());
    lanes_(out[2], layer.mask_out, 0, true);
  }
  if (need_bias) out[3] = g.sum(0);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Layer& layer) {
  if (is_widened(x)) return widened_forward(x, layer);
  LinearPlan plan = plan_for(x, layer);
  if (plan.padded) return padded_forward(x, layer);
  if (plan.route != LinearPlan::Route::kPasses) return library_forward(x, layer);
  auto [y, t, masked] = passes_forward(x, layer, plan);
  return {y, t};
}

std::array<Tensor, 4> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need) {
  // Asked of the gradient: where x is not needed, widened_backward leaves it as it is and comes back here.
  if (is_widened(grad)) return widened_backward(grad, x, t, layer, need);
  LinearPlan plan = plan_for(x, layer);
  if (plan.padded) return padded_backward(grad, x, t, layer, need);
  return plan.route == LinearPlan::Route::kPasses ? passes_backward(grad, x, t, layer, need, plan)
                                                  : library_backward(grad, x, t, layer, need);
}

Tensor lanes(const Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only) {
  if (!mask.has_value()) return matrix;
  Tensor out = at::empty({matrix.size(0), matrix.size(1)}, matrix.options());
  run_lanes(matrix, out, mask, dim, select_only);
  return out;
}

Tensor lanes_resized(const Tensor& matrix, int64_t rows, int64_t cols, const OptTensor& mask, int64_t dim,
                     bool select_only) {
  Tensor out = at::empty({rows, cols}, matrix.options());
  run_lanes(matrix.narrow(0, 0, std::min(rows, matrix.size(0))).narrow(1, 0, std::min(cols, matrix.size(1))),
            out, mask, dim, select_only);
  return out;
}

void lanes_(Tensor& matrix, const OptTensor& mask, int64_t dim, bool select_only) {
  if (mask.has_value()) run_lanes(matrix, matrix, mask, dim, select_only);
}

}  // namespace apt
