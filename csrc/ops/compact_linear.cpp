#include "compact_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string>
#include <utility>

#include "../checks.h"
#include "../device.h"
#include "../routes/linear.h"
#include "../routes/low_rank_passes.h"
#include "../routes/padded.h"
#include "../routes/resize_factors.h"
#include "apt_linear.h"
#include "dropout_mask.h"

namespace apt {
namespace {

// Whole 16 bytes of channels, as the products want them. A side that keeps all is left as it is.
int64_t kept_width(int64_t kept, int64_t size) {
  return kept == size ? size : kept <= 8 ? 8 : (kept + 7) / 8 * 8;
}

// Return the kept channels of a mask or bias.
OptTensor kept_vector(const OptTensor& vector, const Side& side) {
  if (!vector.has_value() || side.keeps_all) return vector;
  return gathered(vector->unsqueeze(0), side.index, side.width).squeeze(0);
}

// The factors of the dense layer that is left. `rank` may be padded.
struct InnerFactors {
  ResizedFactor A, B;
};

InnerFactors inner_factors(const CompactOperands& o, const Sides& sides, int64_t rank) {
  auto index_of = [](const Side& side) { return side.keeps_all ? std::nullopt : OptTensor(side.index); };
  return {{.from = o.lora_A, .rows = rank, .columns = sides.in.width, .column_index = index_of(sides.in)},
          {.from = o.lora_B, .rows = sides.out.width, .columns = rank, .row_index = index_of(sides.out)}};
}

// The dense layer that is left, without its factors. Where a side moves, its mask acts on the way.
Layer inner_layer(const CompactOperands& o, const Sides& sides) {
  const Side &in = sides.in, &out = sides.out;
  Layer inner;
  if (o.weight.has_value()) inner.weight = used_weight(*o.weight, sides).view({out.width, in.width});
  if (!in.moves()) inner.mask_in = kept_vector(in.mask, in);
  if (!out.moves()) inner.mask_out = kept_vector(out.mask, out);
  inner.scaling = o.scaling / (1.0 - o.dropout);
  inner.drop = drop_of(o.dropout, o.rng);
  if (inner.drop && !in.keeps_all) inner.drop.channels = o.index_in;
  return inner;
}

// The passes of 16-bit types on CUDA gather and scatter on the way, where they take this layer.
struct Passes {
  LinearPlan plan;
  KeptSides kept;
  bool fit;
  int64_t rank;  // that the products are made with: padded where the library would be slow
};

Passes passes_for(const Tensor& x, int64_t tokens, const CompactOperands& o, const Sides& sides) {
  const int64_t R = o.lora_A.size(0);
  LinearPlan plan = launch_plan({tokens, sides.out.width, sides.in.width, R, dtype_of(x)}, limits_of(x));
  KeptSides kept{sides.in.moves() ? &sides.in : nullptr, sides.out.moves() ? &sides.out : nullptr, o.lora_A,
                 o.lora_B};
  // They draw dropout for columns that are channels.
  const bool fit =
      o.weight.has_value() && passes_fit(x, plan, kept) && (o.dropout == 0.0 || sides.in.keeps_all);
  return {plan, kept, fit, plan.padded ? padded_rank(R) : R};
}

c10::SymInt out_channels(const CompactOperands& o) {
  return o.compact_out ? o.index_out.sym_size(0) : o.lora_B.sym_size(0);
}

}  // namespace

Sides sides_of(const CompactOperands& o) {
  constexpr int64_t kMost = (int64_t{1} << 30) - 1;
  const int64_t K = o.lora_A.size(1), N = o.lora_B.size(0);
  // A transform wraps `kept`, which then has no memory of its own.
  const int64_t word = o.kept.has_storage() ? *o.kept.const_data_ptr<int64_t>() : o.kept.item<int64_t>();
  const int64_t kept_in = word & kMost, kept_out = word >> 30 & kMost;
  const bool fractions_in = (word >> 60 & 1) != 0, fractions_out = (word >> 61 & 1) != 0;
  TORCH_CHECK_VALUE(word >= 0 && kept_in <= K && kept_out <= N, "kept must say at most K=", text(K),
                    " and N=", text(N), " lanes, got ", text(kept_in), " and ", text(kept_out));
  auto side = [](const Tensor& index, const Tensor& position, const OptTensor& mask, bool has_fractions,
                 int64_t size, int64_t kept, bool compact) {
    const KeptSide moved{index, position, has_fractions ? mask : std::nullopt, size, kept_width(kept, size)};
    return Side{moved, kept, kept == size, compact};
  };
  Sides sides{side(o.index_in, o.position_in, o.mask_in, fractions_in, K, kept_in, o.compact_in),
              side(o.index_out, o.position_out, o.mask_out, fractions_out, N, kept_out, o.compact_out)};
  for (auto [one, name] : {std::pair(&sides.in, "index_in"), std::pair(&sides.out, "index_out")}) {
    const int64_t entries = one->index.size(0);
    TORCH_CHECK_VALUE(one->compact ? entries == one->width : entries >= one->width, name, " must have ",
                      one->compact ? "" : "at least ", text(one->width), " entries, got ", text(entries));
  }
  const int64_t needed = sides.in.width * sides.out.width;
  TORCH_CHECK_VALUE(!o.weight.has_value() || o.weight->numel() >= needed, "packed must hold at least ",
                    text(needed), " values, got ", text(o.weight.has_value() ? o.weight->numel() : 0));
  return sides;
}

Tensor used_weight(const Tensor& packed, const Sides& sides) {
  return packed.narrow(0, 0, sides.in.width * sides.out.width);
}

void check_width(const Tensor& x, const char* name, bool compact, const Side& side) {
  TORCH_CHECK_VALUE(!compact || x.size(-1) == side.width, name, " must have ", text(side.width),
                    " channels, the kept lanes in whole 16 bytes, got ", text(x.size(-1)));
}

void check_compact(const Tensor& x, const CompactOperands& o) {
  check_factors(x, o);
  const Tensor &A = o.lora_A, &B = o.lora_B;
  check_dtype_of_x(x, o.weight, "weight", A, B);
  check_factor_dtypes(x, o);
  const c10::SymInt N = B.sym_size(0), K = A.sym_size(1);
  TORCH_CHECK_VALUE(o.compact_in || o.gathered || x.sym_size(-1) == K, "x must have shape [..., K=", text(K),
                    "] to fit lora_A, got ", text(x.sym_sizes()));
  check_matrix(B, "lora_B", "N", N, "R", A.sym_size(0), [&] { return sized("lora_A", A); });
  const c10::SymInt values = o.weight.has_value() ? o.weight->sym_numel() : 0;
  for (auto [vector, name, size_name, size] :
       {std::tuple(&o.weight, "packed", "values", &values), std::tuple(&o.bias, "bias", "N", &N)}) {
    if (!vector->has_value()) continue;
    check_strided(**vector, name);
    check_same_dtype(**vector, name, x, "x");
    check_same_device(**vector, name, x, "x");
    check_vector(**vector, name, size_name, *size);
  }
  TORCH_CHECK_VALUE(!o.weight.has_value() || o.weight->is_contiguous(), "packed must be contiguous");
  check_mask(o.mask_in, "mask_in", "K", K, x, "x");
  check_mask(o.mask_out, "mask_out", "N", N, x, "x");
  for (auto [vector, name, size_name, size] :
       {std::tuple(&o.index_in, "index_in", "entries", o.index_in.sym_numel()),
        std::tuple(&o.index_out, "index_out", "entries", o.index_out.sym_numel()),
        std::tuple(&o.position_in, "position_in", "K", K),
        std::tuple(&o.position_out, "position_out", "N", N)}) {
    check_strided(*vector, name);
    check_same_device(*vector, name, x, "x");
    check_vector(*vector, name, size_name, size);
    TORCH_CHECK_TYPE(vector->scalar_type() == at::kInt && vector->is_contiguous(), name,
                     " must be contiguous and int32, got ", name_of(vector->scalar_type()));
  }
  TORCH_CHECK_TYPE(o.kept.dim() == 0 && o.kept.scalar_type() == at::kLong,
                   "kept must be an int64 tensor without dimensions, got ", name_of(o.kept.scalar_type()),
                   " of shape ", text(o.kept.sym_sizes()));
  TORCH_CHECK_VALUE(o.kept.is_cpu() || x.is_meta(), "kept must be on the CPU, got ", o.kept.device().str());
  check_dropout(o.dropout, o.rng, x);
}

CompactForward compact_forward(const Tensor& x, const CompactOperands& o) {
  check_compact(x, o);
  Sides sides = sides_of(o);
  check_width(x, "x", o.compact_in, sides.in);
  const int64_t R = o.lora_A.size(0);
  if (x.numel() == 0) {
    Tensor y = at::empty_symint(with_last(x, out_channels(o)), x.options());
    if (y.numel() == 0) return {y, at::zeros_symint(with_last(x, R), low_rank_options(x)), x, false};
  }
  Scope scope(x);
  Tensor used = limit_row_stride(flat(x)), y, t;
  Passes passes = passes_for(x, used.size(0), o, sides);
  Layer inner = inner_layer(o, sides);
  auto [A, B] = inner_factors(o, sides, passes.rank);
  if (passes.fit && sides.out.moves()) B.from = Tensor();  // the scatter takes the full-size one
  std::tie(inner.lora_A, inner.lora_B) = std::tuple_cat(resize_factors(A, B));
  if (!sides.out.moves()) inner.bias = kept_vector(o.bias, sides.out);
  if (passes.fit) {
    if (sides.out.moves()) inner.bias = o.bias;  // added while y is scattered
    std::tie(y, t, used) = passes_forward(used, inner, passes.plan, passes.kept);
  } else {
    if (sides.in.moves()) used = gathered(used, sides.in);
    std::tie(y, t) = linear_forward(used, inner);
    t = t.narrow(1, 0, R);
    if (sides.out.moves()) y = scattered(y, sides.out, o.bias);
  }
  return {y.view_symint(with_last(x, y.size(1))), t.view_symint(with_last(x, R)),
          sides.in.moves() ? used.view_symint(with_last(x, sides.in.width)) : x, sides.in.moves()};
}

std::tuple<Tensor, Tensor> compact_linear_forward(const Tensor& x, const CompactOperands& o) {
  if (x.is_meta()) {
    check_compact(x, o);
    return {at::empty_symint(with_last(x, out_channels(o)), x.options()),
            at::empty_symint(with_last(x, o.lora_A.sym_size(0)), low_rank_options(x))};
  }
  CompactForward done = compact_forward(x, o);
  return {done.y, done.t.contiguous()};
}

Tensor compact_linear(const Tensor& x, const CompactOperands& o) {
  return std::get<0>(compact_linear_forward(x, o));
}

namespace {

std::array<Tensor, 4> backward(const Tensor& grad, const Tensor& x, const Tensor& t, const CompactOperands& o,
                               const Needs& need) {
  auto [need_x, need_A, need_B, need_bias] = need;
  const Tensor &lora_A = o.lora_A, &lora_B = o.lora_B;
  Sides sides = sides_of(o);
  check_width(x, "x", o.compact_in || o.gathered, sides.in);
  const Side &in = sides.in, &out = sides.out;
  Scope scope(x);
  Tensor used = limit_row_stride(flat(x)), g = limit_row_stride(flat(grad));
  Passes passes = passes_for(x, g.size(0), o, sides);
  const bool scatters = passes.fit && in.moves(), gathers = passes.fit && out.moves();
  Layer inner = inner_layer(o, sides);
  auto [A, B] = inner_factors(o, sides, passes.rank);
  B.by_column = gathers;  // as a pass that gathers reads it; one that scatters reads all of A so
  if (scatters) {
    A = {.from = need_x ? lora_A : Tensor(),
         .rows = lora_A.size(0),
         .columns = lora_A.size(1),
         .by_column = true};
  }
  std::tie(inner.lora_A, inner.lora_B) = std::tuple_cat(resize_factors(A, B));
  if (scatters && need_x) passes.kept.lora_A = inner.lora_A;
  if (in.moves() && !o.gathered) {
    // Without a gradient of A only its shape is looked at.
    used = need_A ? gathered(used, in) : used.new_empty({1}).expand({used.size(0), in.width});
  }
  std::array<Tensor, 4> grads;
  if (passes.fit) {
    grads = passes_backward(g, used, flat(t), inner, need, passes.plan, passes.kept);
  } else {
    if (!need_x) inner.weight.reset();  // a copy of it may be spared
    if (out.moves()) g = gathered(g, out);
    grads = linear_backward(g, used, low_of_rank(flat(t), passes.rank), inner, need);
  }
  if (need_x) {
    if (in.moves() && !scatters) grads[0] = scattered(grads[0], in);
    grads[0] = grads[0].view_symint(with_last(x, o.compact_in ? x.sym_size(-1) : lora_A.sym_size(1)));
  }
  auto places = [](const Side& side, bool placed) {
    return side.keeps_all || placed ? std::nullopt : OptTensor(side.position);
  };
  const ResizedFactor dA{.from = grads[1],
                         .rows = lora_A.size(0),
                         .columns = lora_A.size(1),
                         .column_index = places(in, scatters)};
  const ResizedFactor dB{
      .from = grads[2], .rows = lora_B.size(0), .columns = lora_B.size(1), .row_index = places(out, gathers)};
  std::tie(grads[1], grads[2]) = std::tuple_cat(resize_factors(dA, dB));
  if (need_bias && !out.keeps_all)
    grads[3] = gathered(grads[3].unsqueeze(0), out.position, out.size).squeeze(0);
  return grads;
}

}  // namespace

Gradients compact_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& t,
                                  const CompactOperands& o, const Needs& need) {
  check_compact(x, o);
  check_grad_and_t(grad, t, x, out_channels(o), o.lora_A.sym_size(0));
  std::array<Tensor, 4> out;
  if (x.is_meta()) {
    const auto sizes = with_last(x, o.compact_in ? x.sym_size(-1) : o.lora_A.sym_size(1));
    out = empty_gradients(x, sizes, o, o.lora_B.sym_size(0), need);
  } else {
    out = backward(grad, x, t, o, need);
  }
  return gradients_of(out, x);
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
  const OptTensor buffer(packed);
  const Tensor no_rows = weight.narrow(0, 0, 0), no_columns = weight.narrow(1, 0, 0), unused;
  Sides sides = sides_of({{buffer, kNone, no_rows, no_columns, kNone, kNone},
                          index_in,
                          index_out,
                          unused,
                          unused,
                          kept,
                          1.,
                          false,
                          false});
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

}  // namespace apt
