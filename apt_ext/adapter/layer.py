"""APTAdapter: a frozen linear layer, a low-rank path beside it and one mask a side (Eq. 2 of the paper, bias included).

    y = mask_out * ((mask_in * x) W^T + s ((mask_in * x) A^T) B^T + b)

Shapes: x [..., K], W [N, K], lora_A [R, K], lora_B [N, R], mask_in [K], mask_out [N]; K in_features, N out_features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..common.checks import (
    FLOATING,
    checked_choice,
    checked_device,
    checked_int,
    checked_mask,
    checked_number,
    linear_shape,
)
from ..distributed import agreement
from ..distributed.dtensor import is_sharded, replicated
from ..optim import resize
from ..optim.initial_state import OptimizerLike, optimizers_of
from ..optim.step_guard import guard, reserve
from .host_mask import HostMask
from .shared_memory import merged_into
from .state_dict import Saving


class APTAdapter(Saving):
    """The low-rank path alone, as in the seed: y = mask_out * s * ((mask_in * x) A^T) B^T.

    Use :meth:`from_linear` for the whole of Eq. 2. lora_A is Gaussian with standard deviation ``init_std``
    (None: 1 / sqrt(3 in_features)), lora_B is zero, so the adapter starts as the identity on its base layer.

    Args:
        in_features, out_features: K and N.
        rank: R, 0 <= R <= min(N, K). Rank 0 learns nothing and still carries masks.
        scaling: s, constant for life (PEFT: lora_alpha / r).
        max_rank: storage for this many ranks is reserved, and growth within it changes no Parameter, optimizer state,
            compiled graph or DDP/FSDP wrapping. None: growth re-allocates. Lowered to min(N, K).
        dropout: probability of dropping a low-rank input during training, 0 <= p < 1.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; the message names it.
    """

    lora_A: nn.Parameter  # [R, K], or [max_rank, K] with zero rows at and above rank
    lora_B: nn.Parameter  # [N, R], or [N, max_rank] with zero columns at and above rank
    mask_in: Tensor  # [K] float32 whatever the module's dtype
    mask_out: Tensor  # [N] float32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        scaling: float = 2.0,
        *,
        max_rank: int | None = None,
        dropout: float = 0.0,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checked_int("in_features", in_features, 0)
        self.out_features = checked_int("out_features", out_features, 0)
        limit = min(in_features, out_features)
        if checked_int("rank", rank, 0) > limit:
            raise ValueError(f"rank must be at most min(out_features, in_features) = {limit}, got {rank}")
        if max_rank is not None:
            max_rank = min(checked_int("max_rank", max_rank, 0), limit)
            if rank > max_rank:
                raise ValueError(f"rank must be at most max_rank = {max_rank}, got {rank}")
        scaling = checked_number("scaling", scaling)
        if not 0.0 <= checked_number("dropout", dropout) < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if init_std is not None and checked_number("init_std", init_std) < 0:
            raise ValueError(f"init_std must be at least 0, got {init_std}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
            raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype!r}")
        checked_device(device)
        self._rank = rank
        self._max_rank = max_rank
        self._scaling = scaling
        self.dropout = float(dropout)
        self.init_std = 1.0 / math.sqrt(3 * max(in_features, 1)) if init_std is None else float(init_std)
        self._disabled = False
        self.register_module("base_layer", None)
        stored = rank if max_rank is None else max_rank
        with torch.inference_mode(False):  # a tensor born in inference mode could never be trained
            self.lora_A = nn.Parameter(torch.empty(stored, in_features, device=device, dtype=dtype))
            self.lora_B = nn.Parameter(torch.empty(out_features, stored, device=device, dtype=dtype))
            self.register_buffer("mask_in", torch.empty(in_features, device=device, dtype=torch.float32))
            self.register_buffer("mask_out", torch.empty(out_features, device=device, dtype=torch.float32))
        self._guard()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 8,
        scaling: float = 2.0,
        *,
        max_rank: int | None = None,
        dropout: float = 0.0,
        init_std: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> APTAdapter:
        """Wrap an ``nn.Linear`` or transformers' ``Conv1D``: it becomes ``base_layer``, frozen, not copied.

        The factors get ``dtype`` (None: the weight's; float32 is allowed over a 16-bit weight) on the weight's device.

        Raises:
            TypeError: another module type (quantised layers are named), or a dtype that does not fit.
            ValueError: a rank that does not fit, or a weight that is not finite (not looked at on meta).
            RuntimeError: the linear has forward hooks, which would not run, or another adapter has merged into it.
        """
        out_features, in_features, transposed = linear_shape(linear)
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        dtype = weight.dtype if dtype is None else dtype
        if (
            not isinstance(dtype, torch.dtype)
            or dtype != weight.dtype
            and not (dtype == torch.float32 and weight.dtype in (torch.float16, torch.bfloat16))
        ):
            raise TypeError(f"dtype must be the weight's {weight.dtype}, or float32 over a 16-bit weight, got {dtype!r}")
        if checked_int("rank", rank, 0) > min(out_features, in_features):
            raise ValueError(
                f"rank must be at most min(out_features, in_features) = {min(out_features, in_features)} "
                f"for {type(linear).__name__}({in_features}, {out_features}), got {rank}"
            )
        if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
            raise RuntimeError(
                f"linear must have no forward hooks and no forward of its own, which the adapter would not run, got a "
                f"{type(linear).__name__} with one (accelerate's device_map sets it); remove it, or hook the adapter instead"
            )
        if not weight.is_meta and not bool(torch.isfinite(weight.detach()).all()):
            raise ValueError(f"weight of {type(linear).__name__}({in_features}, {out_features}) must be finite, got NaN or Inf")
        if any(merged_into(tensor) for tensor in (weight, bias) if isinstance(tensor, Tensor)):
            raise RuntimeError("from_linear: this linear already carries the merge of another adapter; unmerge that one first")
        adapter = cls(
            in_features,
            out_features,
            rank,
            scaling,
            max_rank=max_rank,
            dropout=dropout,
            init_std=init_std,
            device=weight.device,
            dtype=dtype,
        )
        adapter.base_layer = linear
        adapter._transposed = transposed
        adapter.train(linear.training)
        weight.requires_grad_(False)
        if bias is not None:
            assert isinstance(bias, nn.Parameter)
            bias.requires_grad_(False)
        return adapter

    # -- plain values ------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def max_rank(self) -> int | None:
        return self._max_rank

    @property
    def scaling(self) -> float:
        return self._scaling

    @property
    def Wa(self) -> Tensor:
        """The first ``rank`` rows of lora_A, [rank, K] (the paper's W_A)."""
        return self.lora_A[: self._rank]

    @property
    def Wb(self) -> Tensor:
        """The first ``rank`` columns of lora_B, [N, rank] (the paper's W_B)."""
        return self.lora_B[:, : self._rank]

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, mask_in: Tensor | None = None, mask_out: Tensor | None = None) -> Tensor:
        """x [..., K] -> y [..., N]. A mask given here is used for this call only (float32 or x's dtype, x's device)."""
        if mask_in is not None:
            self._check_override("mask_in", mask_in, self.in_features, x)
        if mask_out is not None:
            self._check_override("mask_out", mask_out, self.out_features, x)
        compiling = is_compiling()
        if not compiling:
            self._changes.check()
        if self.foreign_merges:
            self._refuse_foreign()
        # The registries themselves: attribute access through nn.Module is slow.
        base = self._modules["base_layer"]
        if self._merged or self._disabled:
            if base is None:
                raise RuntimeError("disable_adapter: this APTAdapter has no base layer to fall back on")
            if self._merged:
                self._warn_if_learning()
            return self._through_base(x, compiling)
        kept = self._compaction
        if kept is not None and mask_in is None and mask_out is None and (compiling or self._masks_are_own() and self._source_is_own()):
            return self._compute_kept(x, kept, compiling)
        if self._away:
            self._refuse_away("a forward with masks of its own")
        return self._compute(x, *self._effective_masks(mask_in, mask_out, compiling))

    def _compute(self, x: Tensor, mask_in: Tensor | None, mask_out: Tensor | None) -> Tensor:
        """Eq. 2 under these masks, None for all ones."""
        base, A, B = self._modules["base_layer"], self._parameters["lora_A"], self._parameters["lora_B"]
        assert A is not None and B is not None
        weight: Any = None
        bias: Any = None
        if base is not None:
            own = base._parameters
            weight = own["weight"] if "weight" in own else base.weight
            bias = own["bias"] if "bias" in own else base.bias
            weight = weight.t() if self._transposed else weight
        if self.dropout > 0.0 and self.training:
            # Dropping commutes with masking, so the low-rank path is the same op on its own dropped input.
            low_rank = ops.apt_linear(ops.dropped(x, self.dropout), None, None, A, B, mask_in, mask_out, self._scaling)
            return low_rank if weight is None else ops.apt_linear(x, weight, bias, A[:0], B[:, :0], mask_in, mask_out, 1.0) + low_rank
        return ops.apt_linear(x, weight, bias, A, B, mask_in, mask_out, self._scaling)

    def _set_disabled(self, disabled: bool) -> None:
        if disabled != self._disabled:
            if disabled:
                self._refuse_away("disable_adapter")
            self._disabled = disabled
            self._changes.note(disabled=disabled)

    def _check_override(self, name: str, mask: Tensor, size: int, x: Tensor) -> None:
        if self._merged:
            raise RuntimeError(f"{name} cannot be overridden while merged; call unmerge_weights() first")
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if mask.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{name} must have dtype float32 or x's {x.dtype}, got {mask.dtype}")
        if mask.shape != (size,):
            raise ValueError(f"{name} must have shape [{size}], got {list(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {mask.device}")

    # -- masks -------------------------------------------------------------------------------------------------------

    def set_masks(self, mask_in: Tensor | None = None, mask_out: Tensor | None = None) -> None:
        """Set one or both masks, values in [0, 1] kept as given; None leaves a mask as it is.

        mask_in [in_features], mask_out [out_features], floating, on the module's device. An event, not a hot path:
        the values are looked at once (one device synchronisation). A write into a mask that torch does not count
        (through `.data`, NumPy or a pointer) is seen by the next forward on the CPU. On a device it is seen at the next
        set_masks, state_dict, merge_weights, compact, increase_rank, cut or shrink, which warn of it.

        Raises:
            TypeError: not a floating tensor. ValueError: wrong shape or device, a value outside [0, 1] or NaN.
            RuntimeError: while merged; ranks of a process group that disagree. Both masks are then as before.
        """
        with agreement.change(self._what("set_masks")) as agree:
            self.settle("set_masks")
            if self._merged:
                raise RuntimeError("set_masks: the weight is merged under the present masks; call unmerge_weights() first")
            given = {name: mask for name, mask in (("mask_in", mask_in), ("mask_out", mask_out)) if mask is not None}
            checked = {name: checked_mask(name, mask, self.get_buffer(name)) for name, mask in given.items()}
            change = self.mask_change(checked)
            agree(list(checked), list(checked.values()), self.shared_state())
            change()

    def get_masks(self) -> tuple[Tensor, Tensor]:
        """Copies of (mask_in, mask_out)."""
        return self.mask_in.detach().clone(), self.mask_out.detach().clone()

    def shared_state(self) -> tuple[int, Tensor, Tensor]:
        """What every rank of a process group must hold alike, and DDP and FSDP do not look at: (rank, mask_in, mask_out)."""
        return self._rank, self.mask_in, self.mask_out

    def _what(self, call: str) -> str:
        return f"{call} of {self.label or f'APTAdapter({self.in_features}, {self.out_features})'}"

    def mask_change(self, masks: Mapping[str, Tensor | HostMask]) -> Callable[[], None]:
        """The change to ``masks``, {"mask_in" or "mask_out": checked values}: what can fail is done here, calling the result makes it.

        Values of the present size are copied into the buffer, which compiled and captured graphs hold; others replace it: after a cut.
        Present values write nothing. Values on the host make no device wait.
        """
        new = {name: HostMask.of(mask).known() for name, mask in masks.items()}
        if all(self._carries(name, mask) for name, mask in new.items()):
            return lambda: None
        with torch.inference_mode(False):
            resized = {name: mask.values for name, mask in new.items() if mask.values.shape != getattr(self, name).shape}
            others = {name: values.to(getattr(self, name).device, copy=True) for name, values in resized.items()}
        follow = self._compaction_change(new)

        def make() -> None:
            with torch.no_grad():
                for name, mask in new.items():
                    if name in others:
                        self._buffers[name] = others[name]
                    else:
                        getattr(self, name).copy_(mask.values, non_blocking=True)  # pageable memory is read before this returns
                    self._stamp_mask(name, mask)
                    self._keep_values(name, mask.values)
            follow()

        return make

    # -- rank --------------------------------------------------------------------------------------------------------

    def increase_rank(
        self,
        new_rank: int,
        init_type: str = "lora",
        optimizer: OptimizerLike | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Grow to ``new_rank``: random new rows of A, zero new columns of B, so the output does not change.

        Scaling and all old entries stay bitwise. Within ``max_rank`` nothing is re-allocated and ``optimizer`` is not
        needed. Without it lora_A, lora_B and their gradients are re-allocated in place (same Parameter objects), and the
        state of ``optimizer`` (one, a list, or accelerate's wrapper) is resized with what it would itself start with; an
        optimizer that is not given raises at its next step instead of using state of the old shape. The first Adam step
        of a new column can be up to (1 - beta1) / sqrt(1 - beta2) learning rates long, as for a fresh parameter with a
        late step count.

        Args:
            init_type: "lora" (Gaussian rows), or "zero" as in the seed, which cannot learn and warns.

        Raises:
            ValueError: lower than rank, above min(N, K) or max_rank. RuntimeError: merged; optimizer state that cannot
            be resized; a Parameter held by DDP or FSDP; ranks of a process group that disagree. Everything is then as before.
        """
        with agreement.change(self._what(f"increase_rank({new_rank!r})")) as agree:
            checked_int("new_rank", new_rank, 0)
            checked_choice("init_type", init_type, ("lora", "zero"))
            if generator is not None and not isinstance(generator, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
            self.settle("increase_rank")
            if self._merged:
                raise RuntimeError("increase_rank: the weight is merged; call unmerge_weights() first")
            limit = min(self.in_features, self.out_features)
            if self._max_rank is not None:
                limit = min(limit, self._max_rank)
            limit = max(limit, self._rank)  # a cut leaves ranks above min(N, K)
            if not self._rank <= new_rank <= limit:
                raise ValueError(f"new_rank must lie between rank = {self._rank} and {limit}, got {new_rank}")
            optimizers = optimizers_of(optimizer)
            if new_rank > self._rank and self._max_rank is None:
                resize.resizable_state([self.lora_A, self.lora_B], optimizers)
            elif new_rank > self._rank:
                resize.refuse_pieces(self.lora_A, (self._max_rank or 0, self.in_features))
                resize.refuse_gathered(self.lora_A, "increase_rank")
            agree(init_type, self.shared_state())
            if new_rank > self._rank:
                if init_type == "zero":
                    warnings.warn("init_type='zero' makes both factors zero: the new ranks have no gradient and cannot learn", stacklevel=2)
                self._grow(new_rank, self.init_std if init_type == "lora" else 0.0, optimizers, generator)

    def _grow(self, new_rank: int, std: float, optimizers: list[torch.optim.Optimizer], generator: torch.Generator | None) -> None:
        A, B = self.lora_A, self.lora_B
        old, more = self._rank, new_rank - self._rank
        with torch.inference_mode(False), torch.no_grad():
            rows = resize.draw_rows(more, self.in_features, std, generator, A.device, A.dtype)
            if self._max_rank is None:
                grown_A = torch.cat([A.detach(), rows])
                grown_B = torch.cat([B.detach(), B.new_zeros(self.out_features, more)], dim=1)
                resize.resize_parameters([resize.Resize(A, grown_A, 0), resize.Resize(B, grown_B, 1)], optimizers)
            else:
                resize.write_rows(A, rows, old)
        self._rank = new_rank
        self._guard()

    def settle(self, call: str) -> None:
        super().settle(call)
        self.adopt_rank()

    def adopt_rank(self) -> None:
        """Take the rank that the tensors say, where rows of lora_A or columns of lora_B at and above `rank` are not zero.

        Whatever copies tensors (a moving average, swa_utils, a loop of copy_) copies no `rank`, while forward uses all that is stored.
        For whatever uses the rank at an event: state_dict, merge_weights, increase_rank, a cut, the counts. Never lowers it.
        """
        if self._max_rank is None or self._rank >= self._max_rank:
            return
        found = resize.rank_of(self.lora_A, self.lora_B, self._rank)
        if found == self._rank:
            return
        resize.say_adopted(self._what("rank"), self._rank, found)
        self._rank = found
        self._guard()

    def _guard(self) -> None:
        """Call it whenever the factors are new objects, their sizes or the rank changed: optimizers then step only what fits."""
        guard(self.lora_A, self.lora_B)
        if self._max_rank is not None:
            reserve(self.lora_A, 0, self._rank)
            reserve(self.lora_B, 1, self._rank)

    def apply_grad_mask(self) -> None:
        """Make the gradients of pruned rows and columns exactly zero (NaN included). Fractions do not scale."""
        entries = ((self.lora_A.grad, self.mask_in, 1), (self.lora_B.grad, self.mask_out, 0))
        held = [(grad, (mask != 0).to(torch.float32), dim) for grad, mask, dim in entries if grad is not None and not is_sharded(grad)]
        if held:
            grads, masks, dims = zip(*held, strict=True)
            ops.mask_grads_(list(grads), list(masks), list(dims))
        for grad, mask, dim in entries:
            if grad is not None and is_sharded(grad):
                grad.masked_fill_(replicated(mask == 0, grad).unsqueeze(1 - dim), 0.0)

    # -- counting ----------------------------------------------------------------------------------------------------

    def get_current_rank(self) -> int:
        """The rank, and where tensors of a grown adapter were copied in, theirs (see `adopt_rank`); waits for the device."""
        self.adopt_rank()
        return self._rank

    def get_parameter_count(self) -> int:
        """Trainable entries in use: rank * (in_features + out_features). Reserved rows and frozen factors are none."""
        self.adopt_rank()
        factors = ((self.lora_A, self.in_features), (self.lora_B, self.out_features))
        return sum(self._rank * features for factor, features in factors if factor.requires_grad)

    def get_sparsity_stats(self) -> dict[str, float | int]:
        """Shares of exact zeros in the masks; weight_sparsity = 1 - kept entries of W / all (half x half is 0.75).

        RuntimeError on meta, where masks have no values.
        """
        if self.mask_in.is_meta:
            raise RuntimeError(f"{self._what('get_sparsity_stats')}: expected masks with values, got them on meta")
        kept_in, kept_out = int((self.mask_in != 0).sum()), int((self.mask_out != 0).sum())
        share_in = kept_in / self.in_features if self.in_features else 1.0
        share_out = kept_out / self.out_features if self.out_features else 1.0
        return {
            "input_sparsity": 1.0 - share_in,
            "output_sparsity": 1.0 - share_out,
            "weight_sparsity": 1.0 - share_in * share_out,
            "overall_sparsity": 1.0 - share_in * share_out,
            "active_input_dims": kept_in,
            "active_output_dims": kept_out,
            "total_params": self.get_parameter_count(),
            "rank": self._rank,
        }

    def reset_parameters(self) -> None:
        """lora_A Gaussian, lora_B zero, masks one. The rank stays; refused while merged."""
        if self._merged:
            raise RuntimeError("reset_parameters: the weight is merged; call unmerge_weights() first")
        ones = {name: torch.ones_like(self.get_buffer(name)) for name in ("mask_in", "mask_out")}
        self._refuse_rising("reset_parameters", ones)
        change = self.mask_change(ones)
        with torch.no_grad():
            self.lora_A.zero_()[: self._rank].normal_(0.0, self.init_std)
            self.lora_B.zero_()
        change()
        self._changes.note(factors=object())  # others than before

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank}, scaling={self._scaling}"
        if self._max_rank is not None:
            text += f", max_rank={self._max_rank}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text + (", merged=True" if self._merged else "") + (", compacted=True" if self.compacted else "")

    # -- moving and copying ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> APTAdapter:
        before = {name: (self.get_buffer(name), self._known_ones(name)) for name in ("mask_in", "mask_out")}
        super()._apply(fn, recurse)
        for name, (old, ones) in before.items():
            if self.get_buffer(name).dtype != torch.float32:  # .half() and friends: masks keep every digit
                self._buffers[name] = old.to(self.get_buffer(name).device)
            self._place_stamp(name, ones)
        self._guard()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Version counters start anew in a copy: what travels is whether a mask is known to be all ones.
        return {**super().__getstate__(), "_mask_stamps": {name: self._known_ones(name) for name in self._mask_stamps}}

    def __setstate__(self, state_: dict[str, Any]) -> None:
        super().__setstate__(state_)
        for name, ones in dict(self._mask_stamps).items():
            self._place_stamp(name, bool(ones))
        self._guard()
