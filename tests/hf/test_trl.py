"""TRL's trainers: they take an APTModel and an APTCallback as Trainer does."""

import pytest
import torch
import transformers
from families import FAMILIES
from hf_runs import STEPS, callback, losses

from apt_ext import APTConfig, get_apt_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own
TEXT = [" ".join(f"w{(i * j) % 45}" for j in range(8)) for i in range(16)]
PAIRS = {"prompt": TEXT, "chosen": [" w1 w2"] * 16, "rejected": [" w3 w4"] * 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a tiny decoder and its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(45)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    FAMILIES["llama"].model(dtype=torch.float32).save_pretrained(path)
    return path


def run(base, path, kind, config, data):
    model = get_apt_model(transformers.AutoModelForCausalLM.from_pretrained(base), APTConfig(r=2))
    options = config(
        str(path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=4,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=16,
    )  # fmt: skip
    apt = callback()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return kind(model, args=options, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer, callbacks=[apt]), apt


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_it_prunes_and_goes_on_bit_for_bit(base, tmp_path, name):
    kind, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    data = {"text": TEXT} if name == "SFT" else PAIRS
    one, apt = run(base, tmp_path / "one", kind, config, data)
    one.train()
    assert apt.controller.done and one.model.density <= 0.8 and one.state.log_history[0]["density"] == 1.0
    other, _ = run(base, tmp_path / "other", kind, config, data)
    other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    assert losses(other, 4) == losses(one, 4)
    assert all(torch.equal(value, other.model.state_dict()[key]) for key, value in one.model.state_dict().items())
