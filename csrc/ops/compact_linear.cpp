#include "compact_linear.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <utility>

#include "../autograd/composite.h"
#include "../checks.h"
#include "../device.h"
#include "../op_table.h"
#include "../operands.h"
#include "../routes/gather_scatter.h"
#include "../routes/linear.h"
#include "../routes/resize_factors.h"

namespace apt {
namespace {

// One side of the layer as the arithmetic sees it.
struct Side : KeptSide {
  bool whole;    // nothing is pruned, and nothing is moved
  bool compact;  // the operand is [.., width] already

  bool moves() const { return !compact && !whole; }  // between full size and kept lanes, in this op
};

struct Sides {
  int64_t kept_in, kept_out;
  Side in, out;
};

Sides sides_of(const CompactLayer& layer) {
  constexpr int64_t kMost = (int64_t{1} << 30) - 1;
  int64_t K = layer.lora_A.size(1), N = layer.lora_B.size(0);
  // A transform wraps it, and has no memory of its own.
  int64_t word =
      layer.kept.has_storage() ? *layer.kept.const_data_ptr<int64_t>() : layer.kept.item<int64_t>();
  int64_t kept_in = word & kMost, kept_out = word >> 30 & kMost;
  bool soft_in = (word >> 60 & 1) != 0, soft_out = (word >> 61 & 1) != 0;
  TORCH_CHECK_VALUE(word >= 0 && kept_in <= K && kept_out <= N, "kept must say at most K=", text(K),
                    " and N=", text(N), " lanes, got ", text(kept_in), " and ", text(kept_out));
  auto side = [](const Tensor& index, const Tensor& position, const OptTensor& mask, bool soft, int64_t size,
                 int64_t kept, bool compact) {
    return Side{
        {index, position, soft ? mask : std::nullopt, size, kept_width(kept, size)}, kept == size, compact};
  };
  Sides sides{
      kept_in, kept_out,
      side(layer.index_in, layer.position_in, layer.mask_in, soft_in, K, kept_in, layer.compact_in),
      side(layer.index_out, layer.position_out, layer.mask_out, soft_out, N, kept_out, layer.compact_out)};
  for (auto [one, name] : {std::pair(&sides.in, "index_in"), std::pair(&sides.out, "index_out")}) {
    int64_t entries = one->index.size(0);
    TORCH_CHECK_VALUE(one->compact ? entries == one->width : entries >= one->width, name, " must have ",
                      one->compact ? "" : "at least ", text(one->width), " entries, got ", text(entries));
  }
  int64_t needed = sides.in.width * sides.out.width;
  TORCH_CHECK_VALUE(!layer.packed.has_value() || layer.packed->numel() >= needed,
                    "packed must hold at least ", text(needed), " values, got ",
                    text(layer.packed.has_value() ? layer.packed->numel() : 0));
  return sides;
}

// The kept lanes of a mask or bias.
OptTensor kept_vector(const OptTensor& vector, const Side& side) {
  if (!vector.has_value() || side.whole) return vector;
  return gathered(vector->unsqueeze(0), side.index, side.width).squeeze(0);
}

// The factors of the dense layer that is left, both made in one launch. `rank` may be padded.
struct InnerFactors {
  Remade A, B;
};

InnerFactors inner_factors(const CompactLayer& layer, const Sides& sides, int64_t rank) {
  auto lanes_of = [](const Side& side) { return side.whole ? std::nullopt : OptTensor(side.index); };
  return {{.from = layer.lora_A, .rows = rank, .columns = sides.in.width, .column_index = lanes_of(sides.in)},
          {.from = layer.lora_B, .rows = sides.out.width, .columns = rank, .row_index = lanes_of(sides.out)}};
}

// The dense layer that is left, without its factors. Where a side moves, its mask acts on the way.
Layer inner_layer(const CompactLayer& layer, const Sides& sides) {
  const Side &in = sides.in, &out = sides.out;
  Layer inner;
  if (layer.packed.has_value()) {
    inner.weight = layer.packed->narrow(0, 0, out.width * in.width).view({out.width, in.width});
  }
  if (!in.moves()) inner.mask_in = kept_vector(in.mask, in);
  if (!out.moves()) inner.mask_out = kept_vector(out.mask, out);
  inner.scaling = layer.scaling;
  return inner;
}

// The passes of 16-bit types on CUDA gather and scatter on the way (low_rank_passes.cpp), where they take this layer.
struct Passes {
  LinearPlan plan;
  KeptSides kept;
  bool fit;
  int64_t rank;  // that the products are made with: padded where the library would be slow
};

Passes passes_for(const Tensor& x, int64_t tokens, const CompactLayer& layer, const Sides& sides) {
  const int64_t R = layer.lora_A.size(0);
  LinearPlan plan = launch_plan({tokens, sides.out.width, sides.in.width, R, dtype_of(x)}, limits_of(x));
  KeptSides kept{sides.in.moves() ? &sides.in : nullptr, sides.out.moves() ? &sides.out : nullptr,
                 layer.lora_A, layer.lora_B};
  return {plan, kept, layer.packed.has_value() && passes_fit(x, plan, kept),
          plan.padded ? padded_rank(R) : R};
}

void check_width(const Tensor& x, const char* name, bool compact, const Side& side) {
  TORCH_CHECK_VALUE(!compact || x.size(-1) == side.width, name, " must have ", text(side.width),
                    " channels, the kept lanes in whole 16 bytes, got ", text(x.size(-1)));
}

c10::SymInt out_channels(const CompactLayer& layer) {
  return layer.compact_out ? layer.index_out.sym_size(0) : layer.lora_B.sym_size(0);
}

CompactLayer layer_of(const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                      const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                      const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                      bool compact_out) {
  return {packed,    bias,        lora_A,       lora_B, mask_in, mask_out,   index_in,
          index_out, position_in, position_out, kept,   scaling, compact_in, compact_out};
}

}  // namespace

OptTensor used_part(const CompactLayer& layer) {
  bool sized = layer.packed.has_value() && layer.packed->dim() == 1 && layer.lora_A.dim() == 2 &&
               layer.lora_B.dim() == 2 && layer.index_in.dim() == 1 && layer.index_out.dim() == 1 &&
               layer.kept.is_cpu() && layer.kept.scalar_type() == at::kLong && layer.kept.dim() == 0;
  if (!sized) return layer.packed;  // the op says what is wrong
  Sides sides = sides_of(layer);
  return layer.packed->narrow(0, 0, sides.in.width * sides.out.width);
}

void check_compact(const Tensor& x, const CompactLayer& layer, bool gathered) {
  for (auto [tensor, name] :
       {std::pair(&x, "x"), std::pair(&layer.lora_A, "lora_A"), std::pair(&layer.lora_B, "lora_B")}) {
    check_strided(*tensor, name);
    check_floating(*tensor, name);
    check_same_device(*tensor, name, x, "x");
  }
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have shape [..., K], got a 0-dimensional tensor");
  const Tensor &A = layer.lora_A, &B = layer.lora_B;
  TORCH_CHECK_VALUE(A.dim() == 2, "lora_A must have shape [R, K], got ", text(A.sym_sizes()));
  TORCH_CHECK_VALUE(B.dim() == 2, "lora_B must have shape [N, R], got ", text(B.sym_sizes()));
  check_dtype_of_x(x, layer.packed, "weight", A, B);
  check_dtype_or_float32(A, "lora_A", x.scalar_type(), /*over_any=*/false);
  check_dtype_or_float32(B, "lora_B", x.scalar_type(), /*over_any=*/false);
  c10::SymInt N = B.sym_size(0), K = A.sym_size(1);
  TORCH_CHECK_VALUE(layer.compact_in || gathered || x.sym_size(-1) == K,
                    "x must have shape [..., K=", text(K), "] to fit lora_A, got ", text(x.sym_sizes()));
  check_matrix(B, "lora_B", "N", N, "R", A.sym_size(0), [&] { return sized("lora_A", A); });
  for (auto [vector, name, size_name, size] :
       {std::tuple(layer.packed, "packed", "values",
                   layer.packed.has_value() ? layer.packed->sym_numel() : 0),
        std::tuple(layer.bias, "bias", "N", N)}) {
    if (!vector.has_value()) continue;
    check_strided(*vector, name);
    check_same_dtype(*vector, name, x, "x");
    check_same_device(*vector, name, x, "x");
    check_vector(*vector, name, size_name, size);
  }
  TORCH_CHECK_VALUE(!layer.packed.has_value() || layer.packed->is_contiguous(), "packed must be contiguous");
  check_mask(layer.mask_in, "mask_in", "K", K, x, "x");
  check_mask(layer.mask_out, "mask_out", "N", N, x, "x");
  for (auto [vector, name, size_name, size] :
       {std::tuple(&layer.index_in, "index_in", "entries", layer.index_in.sym_numel()),
        std::tuple(&layer.index_out, "index_out", "entries", layer.index_out.sym_numel()),
        std::tuple(&layer.position_in, "position_in", "K", K),
        std::tuple(&layer.position_out, "position_out", "N", N)}) {
    check_strided(*vector, name);
    check_same_device(*vector, name, x, "x");
    check_vector(*vector, name, size_name, size);
    TORCH_CHECK_TYPE(vector->scalar_type() == at::kInt && vector->is_contiguous(), name,
                     " must be contiguous and int32, got ", name_of(vector->scalar_type()));
  }
  TORCH_CHECK_TYPE(layer.kept.dim() == 0 && layer.kept.scalar_type() == at::kLong,
                   "kept must be an int64 tensor without dimensions, got ", name_of(layer.kept.scalar_type()),
                   " of shape ", text(layer.kept.sym_sizes()));
  TORCH_CHECK_VALUE(layer.kept.is_cpu() || x.is_meta(), "kept must be on the CPU, got ",
                    layer.kept.device().str());
}

CompactForward compact_forward(const Tensor& x, const CompactLayer& layer) {
  check_compact(x, layer, /*gathered=*/false);
  Sides sides = sides_of(layer);
  check_width(x, "x", layer.compact_in, sides.in);
  const int64_t R = layer.lora_A.size(0);
  if (x.numel() == 0) {
    Tensor y = at::empty_symint(with_last(x, out_channels(layer)), x.options());
    if (y.numel() == 0) return {y, at::zeros_symint(with_last(x, R), low_rank_options(x)), x, false};
  }
  Scope scope(x);
  Tensor used = reachable(flat(x)), y, t;
  Passes passes = passes_for(x, used.size(0), layer, sides);
  Layer inner = inner_layer(layer, sides);
  auto [A, B] = inner_factors(layer, sides, passes.rank);
  if (passes.fit && sides.out.moves()) B.from = Tensor();  // the scatter takes the full-size one
  std::tie(inner.lora_A, inner.lora_B) = std::tuple_cat(remade(A, B));
  if (!sides.out.moves()) inner.bias = kept_vector(layer.bias, sides.out);
  if (passes.fit) {
    if (sides.out.moves()) inner.bias = layer.bias;  // added while y is scattered
    std::tie(y, t, used) = passes_forward(used, inner, passes.plan, passes.kept);
  } else {
    if (sides.in.moves()) used = gathered(used, sides.in);
    std::tie(y, t) = linear_forward(used, inner);
    t = t.narrow(1, 0, R);
    if (sides.out.moves()) y = scattered(y, sides.out, layer.bias);
  }
  return {y.view_symint(with_last(x, y.size(1))), t.view_symint(with_last(x, R)),
          sides.in.moves() ? used.view_symint(with_last(x, sides.in.width)) : x, sides.in.moves()};
}

std::tuple<Tensor, Tensor> compact_linear_forward(const Tensor& x, const OptTensor& packed,
                                                  const OptTensor& bias, const Tensor& lora_A,
                                                  const Tensor& lora_B, const OptTensor& mask_in,
                                                  const OptTensor& mask_out, const Tensor& index_in,
                                                  const Tensor& index_out, const Tensor& position_in,
                                                  const Tensor& position_out, const Tensor& kept,
                                                  double scaling, bool compact_in, bool compact_out) {
  CompactLayer layer = layer_of(packed, bias, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                                position_in, position_out, kept, scaling, compact_in, compact_out);
  if (x.is_meta()) {
    check_compact(x, layer, /*gathered=*/false);
    return {at::empty_symint(with_last(x, out_channels(layer)), x.options()),
            at::empty_symint(with_last(x, lora_A.sym_size(0)), low_rank_options(x))};
  }
  CompactForward done = compact_forward(x, layer);
  return {done.y, done.t.contiguous()};
}

Tensor compact_linear(const Tensor& x, const OptTensor& packed, const OptTensor& bias, const Tensor& lora_A,
                      const Tensor& lora_B, const OptTensor& mask_in, const OptTensor& mask_out,
                      const Tensor& index_in, const Tensor& index_out, const Tensor& position_in,
                      const Tensor& position_out, const Tensor& kept, double scaling, bool compact_in,
                      bool compact_out) {
  return std::get<0>(compact_linear_forward(x, packed, bias, lora_A, lora_B, mask_in, mask_out, index_in,
                                            index_out, position_in, position_out, kept, scaling, compact_in,
                                            compact_out));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_linear_backward(
    const Tensor& grad, const Tensor& x, const OptTensor& packed, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& t, const OptTensor& mask_in, const OptTensor& mask_out, const Tensor& index_in,
    const Tensor& index_out, const Tensor& position_in, const Tensor& position_out, const Tensor& kept,
    double scaling, bool compact_in, bool compact_out, bool is_gathered, std::array<bool, 4> output_mask) {
  CompactLayer layer = layer_of(packed, std::nullopt, lora_A, lora_B, mask_in, mask_out, index_in, index_out,
                                position_in, position_out, kept, scaling, compact_in, compact_out);
  check_compact(x, layer, is_gathered);
  check_strided(grad, "grad");
  check_same_dtype(grad, "grad", x, "x");
  check_same_device(grad, "grad", x, "x");
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(with_last(x, out_channels(layer))),
                    "grad must have shape ", text(with_last(x, out_channels(layer))), ", got ",
                    text(grad.sym_sizes()));
  check_strided(t, "t");
  check_same_device(t, "t", x, "x");
  at::ScalarType low_rank = c10::typeMetaToScalarType(low_rank_options(x).dtype());
  TORCH_CHECK_TYPE(t.scalar_type() == low_rank, "t must have dtype ", name_of(low_rank), ", got ",
                   name_of(t.scalar_type()));
  TORCH_CHECK_VALUE(t.sym_sizes() == c10::SymIntArrayRef(with_last(x, lora_A.sym_size(0))),
                    "t must have shape ", text(with_last(x, lora_A.sym_size(0))), ", got ",
                    text(t.sym_sizes()));
  auto [need_x, need_A, need_B, need_bias] = output_mask;
  c10::SymInt N = lora_B.sym_size(0), K = compact_in ? x.sym_size(-1) : lora_A.sym_size(1);
  std::array<Tensor, 4> out;
  if (x.is_meta()) {
    if (need_x) out[0] = at::empty_symint(with_last(x, K), x.options());
    if (need_A) out[1] = at::empty_symint(lora_A.sym_sizes(), lora_A.options());
    if (need_B) out[2] = at::empty_symint(lora_B.sym_sizes(), lora_B.options());
    if (need_bias) out[3] = at::empty_symint({N}, x.options());
  } else {
    Sides sides = sides_of(layer);
    check_width(x, "x", compact_in || is_gathered, sides.in);
    const Side &in_side = sides.in, &out_side = sides.out;
    Scope scope(x);
    Tensor used = reachable(flat(x)), g = reachable(flat(grad));
    Passes passes = passes_for(x, g.size(0), layer, sides);
    const bool scatters = passes.fit && in_side.moves(), gathers = passes.fit && out_side.moves();
    Layer inner = inner_layer(layer, sides);
    auto [A, B] = inner_factors(layer, sides, passes.rank);
    B.by_column = gathers;  // as a pass that gathers reads it; one that scatters reads all of A so
    if (scatters) {
      A = {.from = need_x ? lora_A : Tensor(),
           .rows = lora_A.size(0),
           .columns = lora_A.size(1),
           .by_column = true};
    }
    std::tie(inner.lora_A, inner.lora_B) = std::tuple_cat(remade(A, B));
    if (scatters && need_x) passes.kept.lora_A = inner.lora_A;
    if (in_side.moves() && !is_gathered) {
      // Without a gradient of A only its shape is looked at.
      used = need_A ? gathered(used, in_side) : used.new_empty({1}).expand({used.size(0), in_side.width});
    }
    if (passes.fit) {
      out = passes_backward(g, used, flat(t), inner, output_mask, passes.plan, passes.kept);
    } else {
      if (!need_x) inner.weight.reset();  // a copy of it may be spared
      if (out_side.moves()) g = gathered(g, out_side);
      out = linear_backward(g, used, low_of_rank(flat(t), passes.rank), inner, output_mask);
    }
    if (need_x) {
      if (in_side.moves() && !scatters) out[0] = scattered(out[0], in_side);
      out[0] = out[0].view_symint(with_last(x, K));
    }
    auto places = [](const Side& side, bool placed) {
      return side.whole || placed ? std::nullopt : OptTensor(side.position);
    };
    const Remade dA{.from = out[1],
                    .rows = lora_A.size(0),
                    .columns = lora_A.size(1),
                    .column_index = places(in_side, scatters)},
        dB{.from = out[2],
           .rows = lora_B.size(0),
           .columns = lora_B.size(1),
           .row_index = places(out_side, gathers)};
    std::tie(out[1], out[2]) = std::tuple_cat(remade(dA, dB));
    if (need_bias && !out_side.whole) {
      out[3] = gathered(out[3].unsqueeze(0), out_side.position, out_side.size).squeeze(0);
    }
  }
  for (Tensor& gradient : out) {
    if (!gradient.defined()) gradient = at::empty({0}, x.options());
  }
  return {out[0], out[1], out[2], out[3]};
}

void pack_kept_(const Tensor& packed, const Tensor& weight, const Tensor& index_in, const Tensor& index_out,
                const Tensor& kept) {
  check_strided(packed, "packed");
  check_strided(weight, "weight");
  check_floating(packed, "packed");
  check_same_dtype(weight, "weight", packed, "packed");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must have shape [N, K], got ", text(weight.sym_sizes()));
  for (auto [index, name] : {std::pair(&index_in, "index_in"), std::pair(&index_out, "index_out")}) {
    check_strided(*index, name);
    TORCH_CHECK_TYPE(index->scalar_type() == at::kInt && index->dim() == 1 && index->is_contiguous(), name,
                     " must be a contiguous vector of int32, got ", name_of(index->scalar_type()));
  }
  for (auto [tensor, name] :
       {std::pair(&weight, "weight"), std::pair(&index_in, "index_in"), std::pair(&index_out, "index_out")}) {
    check_same_device(*tensor, name, packed, "packed");
  }
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.is_contiguous(),
                    "packed must be a contiguous vector, got shape ", text(packed.sym_sizes()));
  if (packed.is_meta()) return;
  CompactLayer layer{};
  layer.packed = packed, layer.kept = kept, layer.index_in = index_in, layer.index_out = index_out;
  layer.lora_A = weight.narrow(0, 0, 0), layer.lora_B = weight.narrow(1, 0, 0);
  Sides sides = sides_of(layer);
  if (sides.in.width * sides.out.width == 0) return;
  Scope scope(packed);
  GatherArgs args{};
  args.M = sides.out.width, args.C = weight.size(1), args.kept = sides.in.width;
  args.x = weight.const_data_ptr();
  args.x_stride[0] = weight.stride(0), args.x_stride[1] = weight.stride(1);
  args.row_index = index_out.const_data_ptr<int32_t>();
  args.index = index_in.const_data_ptr<int32_t>();
  args.gathered = packed.mutable_data_ptr();
  args.dtype = dtype_of(packed);
  kernels_for(packed).gather(args, current_stream(packed));
}

Tensor composite_compact(const Tensor& x, const CompactLayer& layer) {
  check_compact(x, layer, /*gathered=*/false);
  Sides sides = sides_of(layer);
  check_width(x, "x", layer.compact_in, sides.in);
  const Side &in = sides.in, &out = sides.out;
  auto lanes_of = [](const Side& side, int64_t kept) { return side.index.narrow(0, 0, kept).to(at::kLong); };
  Tensor kept_in = lanes_of(in, sides.kept_in), kept_out = lanes_of(out, sides.kept_out);
  auto of = [](const OptTensor& vector, const Tensor& kept) {
    return vector.has_value() ? OptTensor(vector->index_select(0, kept)) : std::nullopt;
  };
  OptTensor weight;
  if (layer.packed.has_value()) {
    weight = layer.packed->narrow(0, 0, out.width * in.width).view({out.width, in.width});
    weight = weight->narrow(0, 0, sides.kept_out).narrow(1, 0, sides.kept_in);
  }
  Tensor used = layer.compact_in ? x.narrow(-1, 0, sides.kept_in) : x.index_select(-1, kept_in);
  Tensor y = composite_linear(used, weight, of(layer.bias, kept_out), layer.lora_A.index_select(1, kept_in),
                              layer.lora_B.index_select(0, kept_out), of(in.mask, kept_in),
                              of(out.mask, kept_out), layer.scaling);
  if (layer.compact_out) return at::constant_pad_nd(y, {0, out.width - sides.kept_out});
  auto shape = y.sym_sizes().vec();
  shape.back() = out.size;
  return y.new_zeros_symint(shape).index_copy(-1, kept_out, y);
}

}  // namespace apt
