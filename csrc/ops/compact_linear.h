// The layer on its kept lanes: the ops of a compacted adapter (compact_linear.cpp) and their ways through autograd
// (autograd/compact_linear.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace apt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// What forward and backward have in common. Buffers have a fixed size, and what of them is in use stands in
// one number on the host that is read when an op runs: so masks change without a recompilation.
struct CompactLayer {
  // W's kept rows and columns [width_out, width_in] contiguous at the start of a vector, in x's dtype; none:
  // no weight.
  OptTensor packed;
  OptTensor bias;               // [N]
  Tensor lora_A, lora_B;        // [R, K], [N, R], full-size
  OptTensor mask_in, mask_out;  // [K], [N]; read where `kept` says that they have fractions
  Tensor index_in, index_out;   // int32: the kept lanes ascending, then -1
  // int32 [K], [N]: a lane's place among the kept ones; of a pruned lane ~(the number of kept ones before
  // it).
  Tensor position_in, position_out;
  // int64 on the CPU, no dimension: kept_in + kept_out 2^30 + soft_in 2^60 + soft_out 2^61.
  Tensor kept;
  double scaling;
  // Whether x (and its gradient), or y, is [.., width] already: the kept lanes, then zeros, without the mask.
  bool compact_in, compact_out;
};

// Kept lanes are computed in whole 16 bytes; a side that keeps all is left as it is.
inline int64_t kept_width(int64_t kept, int64_t size) {
  return kept == size ? size : kept <= 8 ? 8 : (kept + 7) / 8 * 8;
}

// Of `packed` what the kept lanes take; `kept` is read. None without a weight.
OptTensor used_part(const CompactLayer& layer);

void check_compact(const Tensor& x, const CompactLayer& layer, bool gathered);

struct CompactForward {
  Tensor y, t;
  // What the backward needs of x: its kept lanes under the mask [.., width_in] (gathered), or x itself.
  Tensor x;
  bool gathered;
};
// The arithmetic of the forward op on a real device, without a shape that is known in advance.
CompactForward compact_forward(const Tensor& x, const CompactLayer& layer);

// The op as plain ATen operations, which torch can differentiate and batch in every way.
Tensor composite_compact(const Tensor& x, const CompactLayer& layer);

}  // namespace apt
