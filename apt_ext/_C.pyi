"""The compiled module: typed, positional doors to the dispatcher's ops, and build_info()."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def apt_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
    dropout: float,
    rng: Tensor | None,
) -> Tensor: ...
def apt_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
    dropout: float,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def apt_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    t: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    scaling: float,
    dropout: float,
    rng: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def merge_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    check: bool,
) -> None: ...
def dropout_mask(shape: Sequence[int], p: float, rng: Tensor) -> Tensor: ...
def mask_grads_(grads: Sequence[Tensor], masks: Sequence[Tensor], dims: Sequence[int]) -> None: ...
def compact_linear(
    x: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    index_in: Tensor,
    index_out: Tensor,
    position_in: Tensor,
    position_out: Tensor,
    kept: Tensor,
    scaling: float,
    compact_in: bool,
    compact_out: bool,
    dropout: float,
    rng: Tensor | None,
) -> Tensor: ...
def compact_linear_forward(
    x: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    index_in: Tensor,
    index_out: Tensor,
    position_in: Tensor,
    position_out: Tensor,
    kept: Tensor,
    scaling: float,
    compact_in: bool,
    compact_out: bool,
    dropout: float,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]: ...
def compact_linear_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    t: Tensor,
    mask_in: Tensor | None,
    mask_out: Tensor | None,
    index_in: Tensor,
    index_out: Tensor,
    position_in: Tensor,
    position_out: Tensor,
    kept: Tensor,
    scaling: float,
    compact_in: bool,
    compact_out: bool,
    dropout: float,
    rng: Tensor | None,
    gathered: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def pack_kept_(packed: Tensor, weight: Tensor, index_in: Tensor, index_out: Tensor, kept: Tensor) -> None: ...
def channel_sums(values: Tensor, tokens: Tensor | None, is_signed: bool) -> Tensor: ...

class Listener:
    def __init__(self, is_signed: bool = False) -> None: ...
    def hear(self, h: Tensor, tokens: Tensor | None = None, position: Tensor | None = None) -> bool: ...
    def sums(self) -> list[Tensor]: ...
    @property
    def heard(self) -> bool: ...
    def forget(self) -> None: ...
    def add(self, found: Sequence[Tensor]) -> None: ...

# weight, bias, lora_A, lora_B, mask_out, scaling, dropout
_Layer = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, float, float]

class SharedOutputs:
    """Outputs of layers that read one x, computed together and not handed out yet."""

    def take(self, i: int, x: Tensor, layer: _Layer) -> Tensor | None: ...

def shared_linear(x: Tensor, layers: Sequence[_Layer], always: bool, rng: Callable[[Tensor], Tensor | None]) -> SharedOutputs | None: ...
def next_moment() -> tuple[int, int]: ...
def node_moment() -> tuple[int, int] | None: ...
def all_ones(first: Tensor | None, second: Tensor | None) -> bool: ...
def same_masks(first: Tensor | None, first_before: Tensor, second: Tensor | None, second_before: Tensor) -> bool: ...
def sharing(tensor: Tensor, others: Sequence[Tensor | None]) -> list[int]: ...
def merge_all(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    masks_in: Sequence[Tensor | None],
    masks_out: Sequence[Tensor | None],
) -> int: ...
def check_gpu(gpu: str, major: int, minor: int, archs: str) -> None: ...
def build_info() -> dict[str, Any]: ...

class LinearPlan:
    """How one apt_linear is computed: what takes which route, and how its launches are cut."""

    route: str  # "library" or "passes"
    padded: bool
    rows: int
    up_splits_N: int
    up_splits_K: int
    span_N: int
    span_K: int

def launch_plan(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: str = "bfloat16",
    capability: int = 90,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
) -> LinearPlan: ...
