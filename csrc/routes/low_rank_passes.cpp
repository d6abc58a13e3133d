#include "low_rank_passes.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "../device.h"
#include "mask_channels.h"

namespace apt {

namespace {

const float* data_of(const OptTensor& mask) {
  return mask.has_value() ? mask->const_data_ptr<float>() : nullptr;
}

at::ScalarType low_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

// One direction of the layer: out [M, E] = column_mask * ((mask * x) matrix + scaling low up^T + bias) with
// low [M, R] = (mask * x) down^T. Forward and, with the roles of the sides exchanged, the gradient of x.
struct Direction {
  Tensor x;          // [M, C], aligned rows
  OptTensor matrix;  // [C, E], or none for the low-rank part alone
  Tensor down, up;   // contiguous factors, [R, channels] or by channel [channels, R]
  bool down_by_channel, up_by_channel;
  OptTensor mask, column_mask, bias;  // aligned, masks in float32
  double scaling;
  bool keep_low;
  int rows, up_splits;
  Dropout drop_x, drop_out;
  // x has the first side's size, and out, bias and up (by channel) the second's; their masks are these sides'
  // own.
  const KeptSide *gather = nullptr, *scatter = nullptr;
};

struct Result {
  Tensor out, low, masked;  // masked: (mask * x) where it was written, else x itself
};

Result run(const Direction& d, bool need_out) {
  int64_t M = d.x.size(0), C = d.gather != nullptr ? d.gather->width : d.x.size(1),
          R = d.down.size(d.down_by_channel ? 1 : 0), E = d.up.size(d.up_by_channel ? 0 : 1);
  const Kernels& kernels = kernels_for(d.x);
  Stream stream = current_stream(d.x);
  Result result;
  // One launch writes all where nothing on the output side asks for the dense product in between.
  const bool low_first = !d.matrix.has_value() || (!d.column_mask.has_value() && d.scatter == nullptr);
  at::ScalarType low_dtype = low_type(d.x.scalar_type());
  if (d.keep_low || !low_first || d.gather != nullptr)
    result.low = at::empty({M, R}, d.x.options().dtype(low_dtype));
  result.masked =
      d.mask.has_value() && need_out && d.matrix.has_value() ? at::empty({M, C}, d.x.options()) : d.x;

  LowRankArgs args{};
  args.M = M, args.R = R, args.C = C, args.E = E;
  args.x = d.x.const_data_ptr(), args.x_stride = d.x.stride(0);
  args.down = {d.down.const_data_ptr(), d.down_by_channel};
  args.up = {d.up.const_data_ptr(), d.up_by_channel};
  args.mask = data_of(d.mask), args.column_mask = data_of(d.column_mask);
  args.masked = result.masked.is_same(d.x) ? nullptr : result.masked.mutable_data_ptr();
  args.low = result.low.defined() ? result.low.mutable_data_ptr() : nullptr;
  args.bias = d.bias.has_value() ? d.bias->const_data_ptr() : nullptr;
  args.scaling = d.scaling;
  args.dtype = dtype_of(d.x), args.low_dtype = low_dtype == at::kFloat ? DType::kFloat32 : args.dtype;
  args.drop_x = d.drop_x, args.drop_out = d.drop_out;
  args.rows = d.rows, args.column_splits = 1;
  args.out_stride = E;
  if (d.gather != nullptr) {
    result.masked = gathered(d.x, *d.gather, GatheredLow{result.low, d.down});
    args.x = nullptr, args.masked = nullptr;
  }
  if (!need_out) {
    if (d.gather == nullptr) kernels.low_rank(args, stream);
  } else if (low_first) {
    result.out = at::empty({M, E}, d.x.options());
    args.out = result.out.mutable_data_ptr();
    kernels.low_rank(args, stream);
    if (d.matrix.has_value()) result.out.addmm_(result.masked, *d.matrix);
  } else {
    if (d.gather == nullptr) kernels.low_rank(args, stream);
    Tensor dense = at::mm(result.masked, *d.matrix);
    if (d.scatter != nullptr) {
      result.out = scattered(dense, *d.scatter, d.bias, ScatteredLow{result.low, d.up, d.scaling});
    } else {
      result.out = dense;
      args.x = nullptr, args.masked = nullptr;
      args.out = result.out.mutable_data_ptr();
      args.accumulate = true;
      args.column_splits = d.up_splits;
      kernels.low_rank(args, stream);
    }
  }
  return result;
}

// Sum x[m, c] low[m, r] over spans of tokens. Return the job that adds these partial sums up.
FactorGrad sum_tokens(const Tensor& x, const Tensor& low, Tensor& partial, int64_t span,
                      const Dropout& dropout) {
  int64_t M = x.size(0), C = x.size(1), R = low.size(1), spans = (M + span - 1) / span;
  partial = at::empty({spans, R, C}, x.options().dtype(at::kFloat));
  TokenSumArgs args{M,
                    R,
                    C,
                    x.const_data_ptr(),
                    x.stride(0),
                    low.const_data_ptr(),
                    partial.mutable_data_ptr<float>(),
                    dtype_of(x),
                    dtype_of(low),
                    span,
                    dropout};
  kernels_for(x).token_sums(args, current_stream(x));
  FactorGrad job{};
  job.partial = args.partial, job.spans = spans, job.R = R, job.C = job.E = C;
  return job;
}

// The factor with which the gradient of x leaves. A pass that scatters it wants the full-size one by channel.
// Where that gradient is not asked for, only the sizes of A are read.
struct UpFactor {
  Tensor factor;
  bool by_channel;
};

UpFactor up_factor(const Layer& layer, const KeptSides& kept, bool need_x) {
  if (kept.in == nullptr) return {layer.lora_A, false};
  return need_x ? UpFactor{kept.lora_A.t(), true} : UpFactor{kept.lora_A, false};
}

}  // namespace

bool passes_fit(const Tensor& x, const LinearPlan& plan, const KeptSides& kept) {
  auto fits = [&](const KeptSide* side) { return side == nullptr || can_stage(x, side->size); };
  return plan.route == LinearPlan::Route::kPasses && !plan.padded && fits(kept.in) && fits(kept.out);
}

std::tuple<Tensor, Tensor, Tensor> passes_forward(const Tensor& x, const Layer& layer, const LinearPlan& plan,
                                                  const KeptSides& kept) {
  at::ScalarType dtype = x.scalar_type();
  OptTensor matrix;
  if (layer.weight.has_value()) matrix = layer.weight->t();
  Result result = run(
      {aligned_rows(x), matrix, aligned_contiguous(layer.lora_A, dtype),
       aligned_contiguous(kept.out != nullptr ? kept.lora_B : layer.lora_B, dtype),
       /*down_by_channel=*/false, /*up_by_channel=*/true, aligned_contiguous(layer.mask_in, at::kFloat),
       aligned_contiguous(layer.mask_out, at::kFloat), aligned_contiguous(layer.bias, dtype), layer.scaling,
       layer.keep_low, plan.rows, plan.up_splits_N, layer.drop.own(), Dropout{}, kept.in, kept.out},
      /*need_out=*/true);
  return {result.out, result.low, result.masked};
}

std::array<Tensor, 4> passes_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need,
                                      const LinearPlan& plan, const KeptSides& kept) {
  auto [need_x, need_A, need_B, need_bias] = need;
  at::ScalarType dtype = x.scalar_type();
  Tensor g = aligned_rows(grad), low = t.contiguous();
  OptTensor mask_in = aligned_contiguous(layer.mask_in, at::kFloat),
            mask_out = aligned_contiguous(layer.mask_out, at::kFloat);
  std::array<Tensor, 4> out;
  FactorGrads factors;
  int jobs = 0;
  Tensor partial_A, partial_B, masked_g;
  // The gradient of a factor from a wide matrix, under the mask that the matrix has not yet.
  auto add_job = [&](Tensor& result, const Tensor& factor, const KeptSide* side, const Tensor& wide,
                     const Tensor& narrow, Tensor& partial, int64_t span, const OptTensor& mask,
                     bool by_channel, const Dropout& dropout) {
    result = at::empty_like(factor, at::MemoryFormat::Contiguous);
    FactorGrad& job = factors.job[jobs++] = sum_tokens(wide, narrow, partial, span, dropout);
    job.grad = result.mutable_data_ptr(), job.dtype = dtype_of(result), job.by_channel = by_channel;
    job.mask = data_of(mask), job.scaling = layer.scaling;
    if (side != nullptr) job.E = side->size, job.position = side->position.const_data_ptr<int32_t>();
  };
  auto add_B = [&](const Tensor& wide) {
    add_job(out[2], kept.out != nullptr ? kept.lora_B : layer.lora_B, kept.out, wide, low, partial_B,
            plan.span_N, mask_out, true, Dropout{});
  };
  // First the pass from g's first token to its last, then the one that goes back and finds g's end in the L2
  // cache.
  if (need_B && kept.out == nullptr) add_B(g);
  if (need_x || need_A || kept.out != nullptr) {
    // A pass that gathers wants the factor by rank.
    Tensor down = kept.out != nullptr ? layer.lora_B.t() : layer.lora_B;
    const UpFactor up = up_factor(layer, kept, need_x);
    Result result =
        run({g, layer.weight, aligned_contiguous(down, dtype), aligned_contiguous(up.factor, dtype),
             /*down_by_channel=*/kept.out == nullptr, up.by_channel, mask_out, mask_in, std::nullopt,
             layer.scaling, /*keep_low=*/true, plan.rows, plan.up_splits_K, Dropout{}, layer.drop.own(),
             kept.out, kept.in},
            need_x);
    out[0] = result.out;
    if (!result.masked.is_same(g)) masked_g = result.masked;
    if (need_B && kept.out != nullptr) add_B(masked_g);
    // From the unmasked x: the mask acts on the sums, so a NaN in a pruned channel ends in a pruned column.
    if (need_A)
      add_job(out[1], kept.in != nullptr ? kept.lora_A : layer.lora_A, kept.in, aligned_rows(x), result.low,
              partial_A, plan.span_K, mask_in, false, layer.drop.own());
  }
  if (jobs > 0) kernels_for(x).add_spans(factors, current_stream(x));
  if (need_bias) out[3] = (masked_g.defined() ? masked_g : mask_channels(grad, mask_out, 1, false)).sum(0);
  return out;
}

}  // namespace apt
