#include "shared_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../device.h"
#include "gather_scatter.h"
#include "mask_channels.h"
#include "plan.h"

namespace apt {
namespace {

at::ScalarType shared_low_type(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

LinearPlan plan_of(const Tensor& x, const Layer& layer) {
  return launch_plan({x.size(0), layer.lora_B.size(0), x.size(1), layer.lora_A.size(0), dtype_of(x)},
                     limits_of(x));
}

const float* values_of(const OptTensor& mask) {
  return mask.has_value() ? mask->const_data_ptr<float>() : nullptr;
}

LowRankArgs pass_over(const Tensor& low, double scaling, const LinearPlan& plan, at::ScalarType dtype) {
  LowRankArgs args{};
  args.M = low.size(0), args.R = low.size(1);
  args.low = low.mutable_data_ptr();
  args.scaling = scaling;
  args.dtype = dtype == at::kHalf ? DType::kFloat16 : DType::kBFloat16, args.low_dtype = dtype_of(low);
  args.rows = plan.rows, args.column_splits = 1;
  return args;
}

// What the layers' ranks need in one launch.
struct Ranks {
  const Tensor *factor, *low;  // [R, C] contiguous and aligned, [M, R] contiguous
  double scaling;
  Dropout dropout = {};
  float* partial = nullptr;  // [spans, R, C]
};

// Call run(args) for as many of these at a time as a launch takes: of one scaling, where `alike`.
template <class Run>
void in_launches(const Tensor& x, const std::vector<Ranks>& all, bool alike, Run&& run) {
  const int64_t M = x.size(0), C = x.size(1);
  const LinearPlan plan = launch_plan({M, C, C, kMaxRank, dtype_of(x)}, limits_of(x));
  SharedRanksArgs args{};
  auto start = [&] {
    args = {};
    args.M = M, args.C = C;
    args.x = x.const_data_ptr(), args.x_stride = x.stride(0);
    args.dtype = dtype_of(x);
    args.low_dtype = x.scalar_type() == at::kHalf ? DType::kFloat32 : args.dtype;
    args.rows = plan.rows, args.column_splits = plan.up_splits_K, args.span = plan.span_K;
  };
  start();
  for (const Ranks& one : all) {
    const int64_t R = one.low->size(1);
    const int tiles = static_cast<int>((R + 7) / 8);
    if (args.tiles > 0 && (args.tiles + tiles > kRankTiles || (alike && args.scaling != one.scaling))) {
      run(args);
      start();
    }
    args.scaling = one.scaling;
    for (int64_t r = 0; r < R; r += 8) {
      auto at = [&](const Tensor& tensor, int64_t element) {
        return static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
      };
      args.tile[args.tiles++] = {at(*one.factor, r * C),
                                 at(*one.low, r),
                                 one.partial == nullptr ? nullptr : one.partial + r * C,
                                 R,
                                 static_cast<int>(std::min<int64_t>(8, R - r)),
                                 one.dropout};
    }
  }
  if (args.tiles > 0) run(args);
}

// y of a layer whose t is known, as low_rank_passes makes it.
Tensor output_from(const Tensor& x, const Tensor& low, const Layer& layer) {
  const at::ScalarType dtype = x.scalar_type();
  const LinearPlan plan = plan_of(x, layer);
  const Tensor up = aligned_contiguous(layer.lora_B, dtype), matrix = layer.weight->t();
  const OptTensor mask = aligned_contiguous(layer.mask_out, at::kFloat),
                  bias = aligned_contiguous(layer.bias, dtype);
  LowRankArgs args = pass_over(low, layer.scaling, plan, dtype);
  args.E = args.out_stride = up.size(0);
  args.up = {up.const_data_ptr(), true};
  args.column_mask = values_of(mask);
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.column_splits = plan.up_splits_N;
  args.accumulate = mask.has_value();
  Tensor out = args.accumulate ? at::mm(x, matrix) : at::empty({x.size(0), args.E}, x.options());
  args.out = out.mutable_data_ptr();
  kernels_for(x).low_rank(args, current_stream(x));
  if (!args.accumulate) out.addmm_(x, matrix);
  return out;
}

// The gradients of factors: partial sums first, added up together in the end.
class FactorSums {
 public:
  explicit FactorSums(const Tensor& x) : x_(x) {}

  float* partial(int64_t spans, int64_t R, int64_t C) {
    held_.push_back(at::empty({spans, R, C}, x_.options().dtype(at::kFloat)));
    return held_.back().mutable_data_ptr<float>();
  }

  // The gradient that those partial sums are added up to.
  Tensor add(const float* partial, int64_t spans, int64_t R, int64_t C, const Tensor& factor,
             const OptTensor& mask, double scaling, bool by_channel) {
    Tensor grad = at::empty_like(factor, at::MemoryFormat::Contiguous);
    if (mask.has_value()) held_.push_back(*mask);
    FactorGrad job{};
    job.partial = partial, job.grad = grad.mutable_data_ptr(), job.dtype = dtype_of(grad);
    job.spans = spans, job.R = R, job.C = job.E = C;
    job.mask = values_of(mask), job.scaling = scaling, job.by_channel = by_channel;
    jobs_.push_back(job);
    return grad;
  }

  void finish() const {
    for (size_t first = 0; first < jobs_.size(); first += kFactorGrads) {
      FactorGrads grads{};
      const size_t end = std::min(jobs_.size(), first + kFactorGrads);
      std::copy(jobs_.begin() + first, jobs_.begin() + end, grads.job);
      kernels_for(x_).add_spans(grads, current_stream(x_));
    }
  }

 private:
  Tensor x_;
  std::vector<Tensor> held_;
  std::vector<FactorGrad> jobs_;
};

int64_t spans_of(int64_t M, int64_t span) { return (M + span - 1) / span; }

// What is kept of one layer between the passes over its gradient and those over x.
struct Half {
  Tensor g, u;    // g under its mask where dx is needed, u [M, R] = g B where it has ranks
  Tensor factor;  // lora_A as the passes read it
};

}  // namespace

bool can_share_passes(const Tensor& x, int64_t M, int64_t N, int64_t K, int64_t R, at::ScalarType dtype) {
  if (!x.is_cuda() || (dtype != at::kHalf && dtype != at::kBFloat16)) return false;
  const DType type = dtype == at::kHalf ? DType::kFloat16 : DType::kBFloat16;
  const LinearPlan plan = launch_plan({M, N, K, std::max<int64_t>(R, 1), type}, limits_of(x));
  return plan.route == LinearPlan::Route::kPasses && !plan.padded;
}

std::vector<std::tuple<Tensor, Tensor>> shared_passes_forward(const Tensor& x_given,
                                                              const std::vector<Layer>& layers) {
  const Tensor x = aligned_rows(x_given);
  std::vector<Tensor> lows, factors;
  std::vector<Ranks> ranks;
  lows.reserve(layers.size()), factors.reserve(layers.size());
  for (const Layer& layer : layers) {
    factors.push_back(aligned_contiguous(layer.lora_A, x.scalar_type()));
    lows.push_back(at::empty({x.size(0), layer.lora_A.size(0)}, x.options().dtype(shared_low_type(x))));
    if (lows.back().size(1) > 0)
      ranks.push_back({&factors.back(), &lows.back(), layer.scaling, layer.drop.own()});
  }
  in_launches(x, ranks, /*alike=*/false,
              [&](const SharedRanksArgs& args) { kernels_for(x).shared_down(args, current_stream(x)); });
  std::vector<std::tuple<Tensor, Tensor>> out;
  for (size_t i = 0; i < layers.size(); ++i) {
    out.push_back(lows[i].size(1) > 0 ? std::tuple(output_from(x, lows[i], layers[i]), lows[i])
                                      : linear_forward(x_given, layers[i]));
  }
  return out;
}

SharedGradients shared_passes_backward(const std::vector<Tensor>& grads, const Tensor& x_given,
                                       const std::vector<Tensor>& lows, const std::vector<Layer>& layers,
                                       bool need_x, const std::vector<std::array<bool, 3>>& need) {
  const size_t count = layers.size();
  const Tensor x = aligned_rows(x_given);
  const int64_t M = x.size(0), K = x.size(1);
  const at::ScalarType dtype = x.scalar_type();
  const Kernels& kernels = kernels_for(x);
  const Stream stream = current_stream(x);
  SharedGradients out;
  out.own.resize(count);
  FactorSums sums(x);
  std::vector<Half> halves(count);
  std::vector<Tensor> narrow;  // what launches still read
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    auto [need_A, need_B, need_bias] = need[i];
    const Tensor g = aligned_rows(grads[i]);
    const int64_t N = g.size(1), R = layer.lora_A.size(0);
    const LinearPlan plan = plan_of(x, layer);
    const OptTensor mask = aligned_contiguous(layer.mask_out, at::kFloat);
    Half& half = halves[i];
    half.g = g;
    if (need_B && R > 0) {
      const Tensor& low = narrow.emplace_back(lows[i].contiguous());
      const int64_t spans = spans_of(M, plan.span_N);
      float* partial = sums.partial(spans, R, N);
      kernels.token_sums({M, R, N, g.const_data_ptr(), g.stride(0), low.const_data_ptr(), partial,
                          dtype_of(g), dtype_of(low), plan.span_N},
                         stream);
      out.own[i][1] = sums.add(partial, spans, R, N, layer.lora_B, mask, layer.scaling, true);
    } else if (need_B) {
      out.own[i][1] = at::empty_like(layer.lora_B, at::MemoryFormat::Contiguous);
    }
    const bool masks = mask.has_value() && need_x;
    if (R > 0 && (need_x || need_A)) {
      half.u = at::empty({M, R}, g.options().dtype(shared_low_type(x)));
      half.factor = aligned_contiguous(layer.lora_A, dtype);
      if (masks) half.g = at::empty({M, N}, g.options());
      const Tensor down = aligned_contiguous(layer.lora_B, dtype);
      LowRankArgs args = pass_over(half.u, layer.scaling, plan, dtype);
      args.C = N, args.x = g.const_data_ptr(), args.x_stride = g.stride(0);
      args.down = {down.const_data_ptr(), true};
      args.mask = values_of(mask);
      args.masked = masks ? half.g.mutable_data_ptr() : nullptr;
      kernels.low_rank(args, stream);
    } else if (masks) {
      half.g = mask_channels(g, layer.mask_out, 1, false);
    }
    if (need_A && R == 0) out.own[i][0] = at::empty_like(layer.lora_A, at::MemoryFormat::Contiguous);
    if (need_bias) {
      out.own[i][2] = (masks ? half.g : mask_channels(grads[i], layer.mask_out, 1, false)).sum(0);
    }
  }

  if (need_x) {
    std::vector<Ranks> ranks;
    for (size_t i = 0; i < count; ++i) {
      if (halves[i].u.defined())
        ranks.push_back({&halves[i].factor, &halves[i].u, layers[i].scaling, layers[i].drop.own()});
    }
    bool begun = false;
    out.x = at::empty({M, K}, x.options());
    in_launches(out.x, ranks, /*alike=*/true, [&](SharedRanksArgs args) {
      args.x = args.tile[0].factor;  // an address for what is not read
      args.out = out.x.mutable_data_ptr();
      args.accumulate = begun;
      kernels.shared_up(args, stream);
      begun = true;
    });
    for (size_t i = 0; i < count; ++i) {
      out.x.addmm_(halves[i].g, *layers[i].weight, /*beta=*/begun ? 1 : 0);
      begun = true;
      halves[i].g.reset();
    }
  }

  std::vector<Ranks> ranks;
  const int64_t span = launch_plan({M, K, K, kMaxRank, dtype_of(x)}, limits_of(x)).span_K;
  for (size_t i = 0; i < count; ++i) {
    if (!need[i][0] || !halves[i].u.defined()) continue;
    const int64_t R = halves[i].u.size(1), spans = spans_of(M, span);
    float* partial = sums.partial(spans, R, K);
    out.own[i][0] = sums.add(partial, spans, R, K, layers[i].lora_A, std::nullopt, layers[i].scaling, false);
    const Tensor& u = halves[i].u;
    if (layers[i].drop) {  // each drops other values of x
      kernels.token_sums({M, R, K, x.const_data_ptr(), x.stride(0), u.const_data_ptr(), partial, dtype_of(x),
                          dtype_of(u), span, layers[i].drop.own()},
                         stream);
    } else {
      ranks.push_back({&halves[i].factor, &u, layers[i].scaling, {}, partial});
    }
  }
  in_launches(x, ranks, /*alike=*/false,
              [&](const SharedRanksArgs& args) { kernels.shared_token_sums(args, stream); });
  sums.finish();
  return out;
}

}  // namespace apt
