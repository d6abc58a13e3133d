#include "linear.h"

#include "../device.h"
#include "library.h"
#include "low_rank_passes.h"
#include "padded.h"
#include "widened_cpu.h"

namespace apt {
namespace {

LinearPlan plan_for(const Tensor& x, const Layer& layer) {
  return launch_plan({x.size(0), layer.lora_B.size(0), x.size(1), layer.lora_A.size(0), dtype_of(x)},
                     limits_of(x));
}

// Passes draw dropout for columns that are channels.
bool takes_passes(const LinearPlan& plan, const Layer& layer) {
  return plan.route == LinearPlan::Route::kPasses && !layer.drop.channels.has_value();
}

}  // namespace

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Layer& layer) {
  if (is_widened(x)) return widened_forward(x, layer);
  LinearPlan plan = plan_for(x, layer);
  if (plan.padded) return padded_forward(x, layer);
  if (!takes_passes(plan, layer)) return library_forward(x, layer);
  auto [y, t, masked] = passes_forward(x, layer, plan);
  return {y, t};
}

std::array<Tensor, 4> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                      const Layer& layer, const std::array<bool, 4>& need) {
  // Asked of the gradient: where x is not needed, widened_backward leaves it as it is and comes back here.
  if (is_widened(grad)) return widened_backward(grad, x, t, layer, need);
  LinearPlan plan = plan_for(x, layer);
  if (plan.padded) return padded_backward(grad, x, t, layer, need);
  return takes_passes(plan, layer) ? passes_backward(grad, x, t, layer, need, plan)
                                   : library_backward(grad, x, t, layer, need);
}

}  // namespace apt
