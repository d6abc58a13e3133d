#include "channel_sums.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../checks.h"
#include "../device.h"
#include "../routes/plan.h"

namespace apt {

Tensor channel_sums(const Tensor& values, const OptTensor& tokens, bool is_signed) {
  const auto device = values.device();
  TORCH_CHECK_VALUE(
      (device.is_cpu() || device.is_cuda()) && values.dim() >= 2 && values.layout() == at::kStrided,
      "values must be a dense tensor [..., channels] on the CPU or a GPU, got ",
      name_of(values.scalar_type()), " on ", device.str(), " of shape ", text(values.sym_sizes()));
  OptTensor counted;
  if (tokens.has_value()) {
    const auto leading = values.sizes().slice(0, values.dim() - 1);
    TORCH_CHECK_VALUE(
        tokens->device() == device && tokens->scalar_type() == at::kBool && tokens->sizes() == leading,
        "tokens must be bool ", text(c10::fromIntArrayRefSlow(leading)), " on ", device.str(), ", got ",
        name_of(tokens->scalar_type()), " on ", tokens->device().str(), " of shape ",
        text(tokens->sym_sizes()));
    counted = tokens->contiguous();
  }
  const auto type = values.scalar_type();
  TORCH_CHECK_TYPE(is_compute_dtype(type), "values must be float64, float32, float16 or bfloat16, got ",
                   name_of(type));
  const c10::DeviceGuard guard(device);
  Tensor rows =
      values.detach().reshape({values.numel() / std::max<int64_t>(values.size(-1), 1), values.size(-1)});
  if (rows.size(1) != 1 && rows.stride(1) != 1) rows = rows.contiguous();
  ChannelSumArgs args{.M = rows.size(0), .C = rows.size(1), .stride = rows.stride(0)};
  const auto wide = rows.options().dtype(type == at::kDouble ? at::kDouble : at::kFloat);
  Tensor out = at::empty({args.C}, wide), partial;
  if (args.M == 0 || args.C == 0) return out.zero_();
  args.values = rows.const_data_ptr();
  args.tokens = counted.has_value() ? counted->const_data_ptr<bool>() : nullptr;
  args.out = out.mutable_data_ptr();
  args.dtype = dtype_of(rows);
  args.is_signed = is_signed;
  args.spans = channel_sum_spans(args.M, args.C, limits_of(rows));
  if (args.spans > 1) {
    partial = at::empty({args.spans, args.C}, wide);
    args.partial = partial.mutable_data_ptr();
  }
  kernels_for(rows).channel_sums(args, current_stream(rows));
  return out;
}

}  // namespace apt
