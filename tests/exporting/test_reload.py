"""export loads what it wrote in a process of its own; the other tests do that in theirs."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from families import FAMILIES, adapted, generated, keep_first, outputs, tolerance

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


@pytest.mark.slow
@pytest.mark.usefixtures("loaded_here")
def test_every_family_is_loaded_by_a_process_without_apt_ext(tmp_path):
    """One process for all: what stock classes make of each directory is what the masked model computes, and generates."""
    said = {}
    for name, family in FAMILIES.items():
        apt = adapted(family)
        keep_first(apt, heads=2, hidden=16, neurons=7)
        if family.sizes.get("num_key_value_heads") == 1:
            keep_first(apt, heads=1, hidden=18)
        kind = export(apt, tmp_path / name)
        steps = generated(apt.model, family.inputs(), use_cache=False) if family.decoder else []
        torch.save((family.inputs(), outputs(apt, family.inputs())[0], steps), tmp_path / f"{name}.pt")
        said[name] = [kind, tolerance(family, ("hidden",))]
    script = """
        import json, sys, torch
        sys.modules["apt_ext"] = None  # an import of it would fail
        import transformers
        for name, (kind, within) in json.loads(sys.argv[1]).items():
            inputs, expected, steps = torch.load(f"{name}.pt")
            model = getattr(transformers, kind).from_pretrained(name, dtype="auto").eval()
            with torch.no_grad():
                assert (model(**inputs).logits - expected).abs().max() <= within, name
            inputs.pop("decoder_input_ids", None)
            options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            found = model.generate(**inputs, **options).logits if steps else []
            assert len(found) == len(steps) and all((a - b).abs().max() <= within for a, b in zip(found, steps)), name
            print(name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(said)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == list(FAMILIES)
