"""A row whose width_field the config does not have is found when a Controller begins, not when the training is over."""

import pytest
import torch
from rows import BERT_SIZES, neurons, table  # noqa: F401

from apt_ext import (
    APTConfig,
    Architecture,
    Controller,
    Layers,
    adapter_parameters,
    export,
    get_apt_model,
    plan,
    register_architecture,
    shrink,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("table", "loaded_here")
WORDS = "ElectraConfig has no entry 'ffn_width', in which the row of the table looks for a number of neurons; correct its width_field"


SETTINGS = APTConfig(r=2, prune=["neurons"], density=0.8, round_to=1)


def electra(field):
    layers = Layers(r"encoder\.layer\.(\d+)", (neurons(field, ("intermediate.dense",), "output.dense"),))
    register_architecture(Architecture(("electra",), (layers,)))
    torch.manual_seed(0)
    config = transformers.ElectraConfig(**BERT_SIZES, embedding_size=16, max_position_embeddings=32)
    return transformers.ElectraForSequenceClassification(config).double().eval()


def controller(apt, **options):
    return Controller(apt, torch.optim.SGD(adapter_parameters(apt), 0.1), total_steps=10, **options)


@pytest.mark.parametrize("how", ["stock", "per_layer"])
def test_a_controller_with_export_refuses_it(how):
    apt = get_apt_model(electra("ffn_width"), SETTINGS)
    with pytest.raises(ValueError, match=f"export: expected .*{WORDS}") as caught:
        controller(apt, export=how)
    assert "export='per_layer' would pass" not in str(caught.value)


def test_a_controller_without_says_it(caplog):
    controller(get_apt_model(electra("ffn_width"), SETTINGS)).remove()
    assert WORDS in caplog.text and "nor can export(..., per_layer=True) write it" in caplog.text


def test_plan_and_export_and_save_pretrained_say_the_same(tmp_path):
    model = electra("ffn_width")
    assert WORDS in str(plan(model, SETTINGS).exports["per layer"])
    apt = get_apt_model(model, SETTINGS)
    apt.set_block_mask("0.neurons", (torch.arange(20) < 7).float())
    for per_layer in (False, True):
        with pytest.raises(ValueError, match=f"model: expected sizes that a stock config can say, but {WORDS}"):
            export(apt, tmp_path / "small", per_layer=per_layer)
    with pytest.raises(ValueError, match=f"model: expected sizes that its config can say .* but {WORDS}"):
        shrink(apt).save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_row_with_the_right_name_passes():
    controller(get_apt_model(electra("intermediate_size"), SETTINGS), export="per_layer").remove()
