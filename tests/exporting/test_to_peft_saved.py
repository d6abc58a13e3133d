"""to_peft and what trained whole: PEFT saves modules and copies, so what shares a weight or a name comes with them."""

import pytest
import torch
from families import FAMILIES, adapted, keep_first
from peft_checks import WARNINGS, check, config_in

from apt_ext import APTConfig, to_peft

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("loaded_here"), WARNINGS]

# Hidden dimensions that are left, with as many heads as stock configs then need.
HIDDEN = {"hidden": 16, "heads": 2}
HIDDEN_TIED = {"hidden": 16, "heads": 4}


@pytest.mark.parametrize(
    ("name", "saved", "theirs"),
    [
        ("bert", None, {"classifier"}),
        ("bert", ["classifier", "pooler"], {"classifier", "bert.pooler"}),
        ("distilbert", ["classifier"], {"classifier", "pre_classifier"}),  # to PEFT the one is the end of the other
        ("llama", ["lm_head", "model.norm"], {"lm_head", "model.norm"}),
        ("llama-tied", ["lm_head"], {"lm_head", "model.embed_tokens"}),
        ("gpt2", ["h.1.mlp.c_fc"], {"transformer.h.1.mlp.c_fc"}),
        ("bert", ["encoder.layer.0.intermediate"], {"bert.encoder.layer.0.intermediate"}),
        ("bert", ["encoder.layer.0.intermediate.dense", "intermediate"], {f"bert.encoder.layer.{i}.intermediate" for i in (0, 1)}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
@pytest.mark.parametrize("cut", [{}, {"neurons": 8}, HIDDEN], ids=str)
def test_what_trained_whole_is_saved_with_what_peft_takes_for_the_same(name, saved, theirs, cut, tmp_path):
    family = FAMILIES[name]
    targets = {"gpt2": ["c_attn"], "bert": ["query"], "distilbert": ["q_lin"]}.get(name, ["q_proj"])
    apt = adapted(family, APTConfig(r=2, target_modules=targets, modules_to_save=saved))
    with torch.no_grad():
        for parameter in apt.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    cut = HIDDEN_TIED if cut is HIDDEN and name == "llama-tied" else cut
    model = check(keep_first(apt, **cut), tmp_path / "out", family, within=1e-5)
    assert set(config_in(tmp_path / "out")["modules_to_save"]) >= theirs
    wrapped = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    assert wrapped == theirs


def test_the_task_is_peft_s_where_it_saves_nothing_more(tmp_path):
    kinds = {"SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", None: ""}
    for name, saved, task in (("bert", None, "SEQ_CLS"), ("bert", [], None), ("gpt2", [], "CAUSAL_LM"), ("t5", [], "SEQ_2_SEQ_LM")):
        family = FAMILIES[name]
        model = check(adapted(family, APTConfig(r=2, modules_to_save=saved)), tmp_path / "out", family)
        found = config_in(tmp_path / "out")
        assert found["task_type"] == task and type(model).__name__ == f"PeftModel{task and 'For' or ''}{kinds[task]}"
        assert task or found["auto_mapping"] == {
            "base_model_class": family.kind, "parent_library": f"transformers.models.{name}.modeling_{name}",
        }  # fmt: skip


def test_lone_parameters_come_with_their_module(tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family, APTConfig(r=2, target_modules=["query"], modules_to_save=[]))
    apt.saved = ["bert.pooler.dense.bias"]
    with torch.no_grad():
        apt.model.bert.pooler.dense.bias.fill_(0.7)
    check(apt, tmp_path / "out", family)
    assert config_in(tmp_path / "out")["modules_to_save"] == ["bert.pooler.dense"]


def test_an_adapter_within_what_peft_has_to_save_whole_is_refused(tmp_path):
    apt = adapted(FAMILIES["bert"], APTConfig(r=2, modules_to_save=[]))
    apt.saved = ["bert.pooler.dense.bias"]
    with pytest.raises(ValueError, match="expected no adapter within what trains whole, got bert.pooler.dense, .*merge_and_unload"):
        to_peft(apt, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
