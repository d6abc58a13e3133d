"""What the masks of an adapter leave of it, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layer import APTAdapter


def sparsity_stats(adapter: APTAdapter) -> dict[str, float | int]:
    """Do what `APTAdapter.get_sparsity_stats` promises."""
    if adapter.mask_in.is_meta:
        raise RuntimeError(f"{adapter.naming('get_sparsity_stats')}: expected masks with values, got them on meta")
    kept_in, kept_out = int((adapter.mask_in != 0).sum()), int((adapter.mask_out != 0).sum())
    share_in = kept_in / adapter.in_features if adapter.in_features else 1.0
    share_out = kept_out / adapter.out_features if adapter.out_features else 1.0
    return {
        "input_sparsity": 1.0 - share_in,
        "output_sparsity": 1.0 - share_out,
        "weight_sparsity": 1.0 - share_in * share_out,
        "overall_sparsity": 1.0 - share_in * share_out,
        "active_input_dims": kept_in,
        "active_output_dims": kept_out,
        "total_params": adapter.get_parameter_count(),
        "rank": adapter.rank,
    }
