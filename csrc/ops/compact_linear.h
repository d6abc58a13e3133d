// apt_linear on the kept channels alone: the products have the size of what is kept. Internal:
// apt_ext.APTAdapter.compact prepares the operands.
#pragma once

#include "../operands.h"
#include "../routes/gather_scatter.h"

namespace apt {

// Buffers have a fixed size. What of them is in use stands in one number on the host that is read when an op
// runs, so masks change without a recompilation.
//   weight         W's kept rows and columns [width_out, width_in], contiguous at the start of a vector
//   lora_A, lora_B [R, K], [N, R], full-size, as are the bias [N] and the masks [K], [N]
struct CompactOperands : LayerOperands {
  const Tensor &index_in, &index_out;  // int32: the kept channels ascending, then -1
  // int32 [K], [N]: a channel's place among the kept ones; of a pruned one ~(the number of kept ones before
  // it).
  const Tensor &position_in, &position_out;
  // int64 on the CPU, no dimension: kept_in + kept_out 2^30 + fractions_in 2^60 + fractions_out 2^61. A mask
  // is read only where it has fractions.
  const Tensor& kept;
  double scaling;
  // True if x (and its gradient), or y, is [.., width] already: the kept channels, then zeros, without the
  // mask.
  bool compact_in, compact_out;
  double dropout = 0.0;  // as in LinearOperands; a channel is dropped as it is in the full-size layer
  const OptTensor& rng = kNone;
  bool gathered = false;  // true if x is its kept channels under mask_in, as the forward left them

  CompactOperands with(const LayerOperands& other) const {
    return {other,   index_in,   index_out,   position_in, position_out, kept,
            scaling, compact_in, compact_out, dropout,     rng,          gathered};
  }
  auto rest() const {
    return std::tie(index_in, index_out, position_in, position_out, kept, scaling, compact_in, compact_out,
                    dropout, rng);
  }
  auto backward_rest() const { return std::tuple_cat(rest(), std::tie(gathered)); }
};
using CompactArguments =
    LooseArguments<CompactOperands, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                   double, bool, bool, double, const OptTensor&>;
using CompactBackwardArguments =
    LooseArguments<CompactOperands, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                   double, bool, bool, double, const OptTensor&, bool>;

// One side of the layer as the arithmetic sees it.
struct Side : KeptSide {
  int64_t kept;    // channels; width has those that pad them as well
  bool keeps_all;  // nothing is pruned, and nothing is moved
  bool compact;    // the operand is [.., width] already

  bool moves() const { return !compact && !keeps_all; }  // between full size and kept channels, in this op
};

struct Sides {
  Side in, out;
};

// Read `kept`, and check the buffers against it.
Sides sides_of(const CompactOperands& operands);

// Return the part of the packed weight that is in use.
Tensor used_weight(const Tensor& packed, const Sides& sides);

void check_compact(const Tensor& x, const CompactOperands& operands);
void check_width(const Tensor& x, const char* name, bool compact, const Side& side);

struct CompactForward {
  Tensor y, t;
  // What the backward needs of x: its kept channels under the mask [.., width_in] (gathered), or x itself.
  Tensor x;
  bool gathered;
};
// Compute the forward op on a real device, where no shape has to be known in advance.
CompactForward compact_forward(const Tensor& x, const CompactOperands& operands);

Tensor compact_linear(const Tensor& x, const CompactOperands& operands);
std::tuple<Tensor, Tensor> compact_linear_forward(const Tensor& x, const CompactOperands& operands);
Gradients compact_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                  const CompactOperands& operands, const Needs& need);

// Copy the kept rows and columns of a weight to `packed`, in one pass.
void pack_kept_(const Tensor& packed, const Tensor& weight, const Tensor& index_in, const Tensor& index_out,
                const Tensor& kept);

}  // namespace apt
