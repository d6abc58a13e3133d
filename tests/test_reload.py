"""export loads what it wrote in a process of its own; the other tests do that in theirs."""

import pytest
import torch
from families import FAMILIES, adapted, keep_first

from apt_ext import export, shrink


@pytest.mark.parametrize("kind", ["mistral", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("stock", "per layer", "refused"))])
def test_fresh_process(tmp_path, kind):
    # a process that imports torch and transformers takes seconds
    apt = adapted(FAMILIES["llama"])
    if kind == "per layer":
        apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 0]))
    else:
        keep_first(apt, **{"stock": {"neurons": 7}, "mistral": {"hidden": 16}, "refused": {"neurons": 7}}[kind])
    if kind == "refused":
        small = shrink(apt)
        small.model.layers[0].self_attn.scaling = 3.0  # which no file says
        with pytest.raises(ValueError, match="an output differs"):
            export(small, tmp_path / "small")
        return
    found = export(apt, tmp_path / "small", per_layer=True)
    assert found == {"stock": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "per layer": "apt_ext.load_export"}[kind]
