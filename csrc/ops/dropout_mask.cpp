#include "dropout_mask.h"

#include <string>

#include "../checks.h"
#include "../routes/drop_channels.h"

namespace apt {
namespace {

void check_share(double p, const char* name) {
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0, name, " must lie in [0, 1), got ", std::to_string(p));
}

void check_rng(const Tensor& rng) {
  check_strided(rng, "rng");
  TORCH_CHECK_TYPE(rng.scalar_type() == at::kLong, "rng must be an int64 tensor (seed, offset), got ",
                   name_of(rng.scalar_type()));
  check_vector(rng, "rng", "seed and offset", 2);
}

}  // namespace

void check_dropout(double p, const OptTensor& rng, const Tensor& x) {
  check_share(p, "dropout");
  if (rng.has_value()) {
    check_rng(*rng);
    check_same_device(*rng, "rng", x, "x");
  }
  TORCH_CHECK_VALUE(
      p == 0.0 || rng.has_value(),
      "rng must be an int64 tensor [2] (seed, offset) on x's device where dropout is not 0, got None; "
      "apt_ext.ops.apt_linear draws one");
}

Tensor dropout_mask(c10::SymIntArrayRef shape, double p, const Tensor& rng) {
  check_share(p, "p");
  check_rng(rng);
  for (const c10::SymInt& size : shape)
    TORCH_CHECK_VALUE(size >= 0, "shape must have sizes of at least 0, got ", text(shape));
  TORCH_CHECK_VALUE(!shape.empty(), "shape must be that of x [..., K], got ", text(shape));
  Tensor keep = at::empty_symint(shape, rng.options().dtype(at::kBool));
  if (rng.is_meta() || keep.numel() == 0) return keep;
  Scope scope(rng);
  if (p == 0.0) return keep.fill_(true);
  Tensor rows = keep.view({-1, keep.size(-1)});
  draw_kept_(rows, drop_of(p, rng));
  return keep;
}

}  // namespace apt
