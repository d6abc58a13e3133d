"""APTAdapter: a frozen linear layer, a low-rank path beside it and one mask a side (Eq. 2 of the paper, bias included).

    y = mask_out * ((mask_in * x) W^T + s ((mask_in * x) A^T) B^T + b)

Shapes: x [..., K], W [N, K], lora_A [R, K], lora_B [N, R], mask_in [K], mask_out [N]; K in_features, N out_features.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..common.checks import checked_device, checked_mask
from ..distributed import agreement
from ..optim.initial_state import OptimizerLike
from ..optim.step_guard import guard, reserve
from . import rank as growth
from . import state_dict as saving
from .arguments import check_override, checked_arguments, checked_linear
from .base_layer import through_base
from .carrier import MaskCarrier
from .compact import Packing, has_own_weight
from .counts import sparsity_stats
from .mask import SIDES, Mask
from .mask_change import mask_change, mask_gradients, see_written, settle
from .merge import Merge
from .second_copy import say_second_copy
from .shared_inputs import SharedInput
from .shared_memory import hold, join


class APTAdapter(MaskCarrier):
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

    Attributes that other parts of this package use, beside those of MaskCarrier:
        merge: the Merge into the base layer. packing: the Packing, by which it computes on kept channels.
        shared: the SharedInput that it belongs to and its number there, or None.
        is_transposed: the base layer stores [K, N] (Conv1D). rank_limit: min(N, K) as built; a cut leaves it as it is.
    """

    lora_A: nn.Parameter  # [R, K], or [max_rank, K] with zero rows at and above rank
    lora_B: nn.Parameter  # [N, R], or [N, max_rank] with zero columns at and above rank
    mask_in: Tensor  # [K] float32 whatever the module's dtype
    mask_out: Tensor  # [N] float32
    shared: tuple[SharedInput, int] | None = None

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
        super().__init__(merge=None)
        max_rank, scaling, dtype = checked_arguments(in_features, out_features, rank, scaling, max_rank, dropout, init_std, dtype)
        checked_device(device)
        self.in_features, self.out_features, self.rank_limit = in_features, out_features, min(in_features, out_features)
        self._rank = rank
        self._max_rank = max_rank
        self._scaling = scaling
        self.dropout = float(dropout)
        self.init_std = 1.0 / math.sqrt(3 * max(in_features, 1)) if init_std is None else float(init_std)
        self.is_transposed = False
        self.merge, self.packing = Merge(), Packing()
        self.pending_load: saving.PendingLoad | None = None  # between torch's two hooks of load_state_dict
        self._warned = False
        saving.install(self)
        join(self)
        self.register_module("base_layer", None)
        stored = rank if max_rank is None else max_rank
        with torch.inference_mode(False):  # a tensor born in inference mode could never be trained
            self.lora_A = nn.Parameter(torch.empty(stored, in_features, device=device, dtype=dtype))
            self.lora_B = nn.Parameter(torch.empty(out_features, stored, device=device, dtype=dtype))
            self.register_buffer("mask_in", torch.empty(in_features, device=device, dtype=torch.float32))
            self.register_buffer("mask_out", torch.empty(out_features, device=device, dtype=torch.float32))
        self.begin_masks(*SIDES)
        self.guard_factors()
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
        N, K, transposed, dtype = checked_linear(linear, rank, dtype)
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        adapter = cls(K, N, rank, scaling, max_rank=max_rank, dropout=dropout, init_std=init_std, device=weight.device, dtype=dtype)
        adapter.base_layer = linear
        adapter.is_transposed = transposed
        adapter.train(linear.training)
        weight.requires_grad_(False)
        if bias is not None:
            assert isinstance(bias, nn.Parameter)
            bias.requires_grad_(False)
        return adapter

    # -- plain values ------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """The ranks in use."""
        return self._rank

    @property
    def max_rank(self) -> int | None:
        """The ranks that storage is reserved for; None: growth re-allocates."""
        return self._max_rank

    @property
    def scaling(self) -> float:
        """s, constant for life."""
        return self._scaling

    @property
    def merged(self) -> bool:
        """True between merge_weights and unmerge_weights."""
        return self.merge.active

    @property
    def compacted(self) -> bool:
        """True if the products run on kept rows and columns only."""
        return self.packing.current is not None

    @property
    def weight(self) -> Tensor | None:
        """The base layer's weight as it stores it, read-only: [N, K], or Conv1D's [K, N]."""
        base = self._modules.get("base_layer")  # the registry itself: attribute access through nn.Module is slow
        return None if base is None else base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias [N], read-only."""
        return None if self.base_layer is None else self.base_layer.bias  # type: ignore[return-value]

    @property
    def matrix(self) -> Tensor | None:
        """The weight as W [N, K]; a transposed view for Conv1D, which merge_ writes through."""
        weight = self.weight
        return weight.t() if weight is not None and self.is_transposed else weight

    @property
    def input_positions(self) -> Tensor | None:
        """Where a channel lies in an input of kept channels alone, int32 [in_features], below 0 where pruned; None while not compact."""
        return None if self.packing.current is None else self.packing.current.position_in

    def stored_shape(self) -> tuple[int, int]:
        """The shape that the base layer stores its weight in, by the masks."""
        return (len(self.mask_in), len(self.mask_out)) if self.is_transposed else (len(self.mask_out), len(self.mask_in))

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
            check_override(self, "mask_in", mask_in, x)
        if mask_out is not None:
            check_override(self, "mask_out", mask_out, x)
        compiling = is_compiling()
        if not compiling:
            self.history.check()
        merge, packing = self.merge, self.packing
        if merge.foreign:
            raise RuntimeError(f"{self.naming('forward')}: {next(iter(merge.foreign.values()))}")
        base = self._modules["base_layer"]  # the registry itself: attribute access through nn.Module is slow
        if merge.active or self.disabled:
            if base is None:
                raise RuntimeError("disable_adapter: this APTAdapter has no base layer to fall back on")
            if merge.active and not self._warned:
                self._warn_if_learning()
            return base(x) if compiling else through_base(base, self.is_transposed, x)
        packed = packing.current
        if packed is not None and mask_in is None and mask_out is None and (compiling or self.masks_are_own() and has_own_weight(base)):
            return packing.compute(self, packed, x, compiling)
        if packing.store.host is not None:
            packing.refuse_offloaded("a forward with masks of its own")
        may_share = self.shared is not None and not compiling and mask_in is None and mask_out is None
        mask_in, mask_out, written = self.placed.effective(self._buffers, mask_in, mask_out, compiling)
        if written:
            self.see_written_masks()
            mask_in, mask_out, _ = self.placed.effective(self._buffers, mask_in, mask_out, compiling)
        if may_share and mask_in is None and self.shared is not None:
            shared = self.shared[0].output(self.shared[1], self, x, mask_out)
            if shared is not None:
                return shared
        return self.compute(x, mask_in, mask_out)

    def compute(self, x: Tensor, mask_in: Tensor | None, mask_out: Tensor | None) -> Tensor:
        """Eq. 2 under these masks, None for all ones."""
        base, A, B = self._modules["base_layer"], self._parameters["lora_A"], self._parameters["lora_B"]
        assert A is not None and B is not None
        weight: Any = None
        bias: Any = None
        if base is not None:
            own = base._parameters
            weight = own["weight"] if "weight" in own else base.weight
            bias = own["bias"] if "bias" in own else base.bias
            weight = weight.t() if self.is_transposed else weight
        return ops.apt_linear(x, weight, bias, A, B, mask_in, mask_out, self._scaling, self.dropout if self.training else 0.0)

    def set_disabled(self, disabled: bool) -> None:
        """Compute as the base layer alone, without masks, or end that. RuntimeError where its weight is offloaded."""
        if disabled and not self.disabled:
            self.packing.refuse_offloaded("disable_adapter")
        super().set_disabled(disabled)

    def _warn_if_learning(self) -> None:
        if self.training and torch.is_grad_enabled() and not is_compiling():
            self._warned = True
            warnings.warn("this APTAdapter is merged: lora_A and lora_B get no gradient until unmerge_weights()", stacklevel=3)

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
        with agreement.change(self.naming("set_masks")) as agree:
            self.settle("set_masks")
            if self.merge.active:
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

    def mask_change(self, masks: Mapping[str, Tensor | Mask]) -> Callable[[], None]:
        """As `MaskCarrier.mask_change`, of "mask_in" or "mask_out".

        Values of the present size are copied into the buffer, which compiled and captured graphs hold; others replace it: after a cut.
        Present values write nothing. Values on the host make no device wait.
        """
        return mask_change(self, masks)

    def see_written_masks(self) -> None:
        """On the CPU somebody wrote into a mask: know what both hold now, also as the function that a backward finds."""
        see_written(self)

    def settle(self, call: str) -> None:
        """Go on with what others have written into masks and factors without torch counting it, and warn of it.

        For the events of an adapter, which wait for the device. On the CPU each forward looks at the masks.
        """
        settle(self, call)

    def naming(self, call: str) -> str:
        """`call`, and which adapter it is about."""
        return f"{call} of {self.label or f'{type(self).__name__}({self.in_features}, {self.out_features})'}"

    # -- merge and compact -------------------------------------------------------------------------------------------

    def merge_weights(self, keep: str = "device") -> None:
        """W <- diag(mask_out) (W + s B A) diag(mask_in), b <- mask_out * b, so ``base_layer(x)`` is the adapter's output.

        The original weight and bias are kept on the device, or with keep="cpu" on the host, until
        :meth:`unmerge_weights` restores them bitwise. Idempotent.

        Raises:
            RuntimeError: no base layer; a weight merged by another adapter; a merged value that would not be finite.
            ValueError: keep is neither "device" nor "cpu". The layer is then bitwise as before.
        """
        self.packing.store.restore(self.weight)
        try:
            self.merge.make(self, keep)
        except BaseException:
            self.packing.offload(self)
            raise

    def unmerge_weights(self) -> None:
        """Restore the base layer bitwise from what :meth:`merge_weights` kept. Idempotent."""
        self.merge.undo(self)
        self.packing.offload(self)

    def compact(self, on: bool = True, dense: str = "keep") -> None:
        """Compute on unpruned rows and columns only. Results are unchanged; time and activation memory shrink with the masks.

        x and y stay full-size, and masks change as before, also back up, without recompiling anything: every change of exact zeros copies
        what is kept of W, in one pass. A captured CUDA graph keeps the widths of its capture: a change of widths after it is logged, and
        where less is kept the old graph gives NaN; capture again.
        ``compact(False)`` undoes it. A state_dict holds nothing of it.

        dense says where the whole W [N, K] is meanwhile:
            "keep"  where it was. What is kept takes its bytes beside it: a second W, logged, if that is all.
            "cpu"   in host memory. The device has what is kept; every change of zeros copies it from there.
                    ``weight`` then reads NaN, and what computes full-size (a forward with masks of its own, disable_adapter) is refused;
                    merge_weights, state_dict and load_state_dict bring the weight back as long as they need it.
        `APTModel.cut` gives the memory of what is pruned back.

        Masks are changed by set_masks, a block's mask or load_state_dict; what is written into a mask's buffer past them is noticed by the
        next forward on the CPU, and on a device by the next such change, state_dict, merge, compact or cut.

        A backward after a change of exact zeros raises torch's error about a tensor modified in place; a second derivative is refused.

        Raises RuntimeError while merged, under FSDP and on meta; nothing has then changed.
        """
        self.packing.check(self, on, dense)
        self.settle("compact")
        self.packing.switch(self, on, dense)
        say_second_copy([self])

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
        growth.increase_rank(self, new_rank, init_type, optimizer, generator)

    def take_rank(self, rank: int) -> None:
        """Use `rank` ranks of the factors as they are now."""
        self._rank = rank
        self.guard_factors()

    def adopt_rank(self) -> None:
        """Take the rank that the tensors say, where rows of lora_A or columns of lora_B at and above `rank` are not zero.

        Whatever copies tensors (a moving average, swa_utils, a loop of copy_) copies no `rank`, while forward uses all that is stored.
        For whatever uses the rank at an event: state_dict, merge_weights, increase_rank, a cut, the counts. Never lowers it.
        """
        growth.adopt_ranks([self])

    def guard_factors(self) -> None:
        """Let optimizers step the factors only while their state fits: after they became other objects, or their sizes or rank changed."""
        guard(self.lora_A, self.lora_B)
        if self._max_rank is not None:
            reserve(self.lora_A, 0, self._rank)
            reserve(self.lora_B, 1, self._rank)

    def apply_grad_mask(self) -> None:
        """Make the gradients of pruned rows and columns exactly zero (NaN included). Fractions do not scale."""
        mask_gradients(self)

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
        """Shares of exact zeros in the masks; weight_sparsity = 1 - kept entries of W / all (half x half is 0.75). RuntimeError on meta."""
        return sparsity_stats(self)

    def reset_parameters(self) -> None:
        """lora_A Gaussian, lora_B zero, masks one. The rank stays; refused while merged."""
        if self.merge.active:
            raise RuntimeError("reset_parameters: the weight is merged; call unmerge_weights() first")
        change = self.mask_change({name: torch.ones_like(self.get_buffer(name)) for name in SIDES})
        with torch.no_grad():
            self.lora_A.zero_()[: self._rank].normal_(0.0, self.init_std)
            self.lora_B.zero_()
        change()
        self.history.note(factors=object())  # others than before

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank}, scaling={self._scaling}"
        if self._max_rank is not None:
            text += f", max_rank={self._max_rank}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text + (", merged=True" if self.merged else "") + (", compacted=True" if self.compacted else "")

    # -- moving, copying and loading -----------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's own, and nothing is loaded where it raises: see `check_loadable`."""
        saving.check_loadable(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> APTAdapter:
        before = {name: self.get_buffer(name) for name in SIDES}
        ones, originals = self.known_ones(), self.merge.move(fn)
        self.packing.moved(self, lambda: super(APTAdapter, self)._apply(fn, recurse), fn)  # type: ignore[no-untyped-call]
        self.merge.originals = originals
        for name, old in before.items():
            if self.get_buffer(name).dtype != torch.float32:  # .half() and friends: masks keep every digit
                self._buffers[name] = old.to(self.get_buffer(name).device)
        self.note_ones(ones)
        self.guard_factors()
        return self

    def __getstate__(self) -> dict[str, Any]:
        parts = {"merge": copy.copy(self.merge), "packing": copy.copy(self.packing)}
        return {**super().__getstate__(), **parts, "_compacted": self.compacted, "shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        compacted = state.pop("_compacted")
        super().__setstate__(state)
        join(self)
        if self.merged:
            hold(self)
        self.packing.copied(self, compacted)
        self.guard_factors()
