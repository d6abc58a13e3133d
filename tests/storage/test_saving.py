"""What save_pretrained and push_to_hub write for models that look stock and are not, by Trainer too."""

import copy
import io
import pickle

import pytest
import torch
from families import FAMILIES, adapted, close, mask_all, outputs, some

import apt_ext
from apt_ext import APTConfig, APTModel, export, get_apt_model, load_export, shrink
from apt_ext.pruning.target import Target

transformers = pytest.importorskip("transformers")

ADAPTER_FILES = {"apt_config.json", "apt_model.safetensors", "apt_manifest.json"}
OWN_FILES = {"apt_weights.safetensors", "apt_weights.safetensors.index.json", "apt_widths.json", "apt_export.json"}
OWN_FILES |= {"modeling_apt.py", "config.json"}
CARD = {"README.md", "provenance.json"}  # of an export


def uneven(name):
    """A family and its model with widths of their own in every layer."""
    family = FAMILIES[name]
    apt = adapted(family)
    return family, mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))


def said(caplog, word):
    return [record for record in caplog.records if record.name == "apt_ext" and word in record.getMessage()]


# -- widths of their own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_cut_model_saves_what_load_export_reads(name, tmp_path, caplog):
    family, apt = uneven(name)
    small = shrink(apt)
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier save")
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        small.save_pretrained(tmp_path)
    assert len(said(caplog, "is for apt_ext.load_export")) == 1
    found = {file.name for file in tmp_path.iterdir()}
    assert found - {"generation_config.json"} == OWN_FILES | {"notes.txt"}
    again = load_export(tmp_path)
    close(outputs(again, family.inputs()), outputs(small, family.inputs()), 1e-12)
    for ignoring in (False, True):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            type(small).from_pretrained(tmp_path, ignore_mismatched_sizes=ignoring)
    again.save_pretrained(tmp_path / "again", max_shard_size="3KB")
    assert len(list((tmp_path / "again").glob("apt_weights-*.safetensors"))) > 1
    close(outputs(load_export(tmp_path / "again"), family.inputs()), outputs(small, family.inputs()), 1e-12)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_save_themselves(how, tmp_path):
    family, apt = uneven("bert")
    small = shrink(apt)
    if how == "deepcopy":
        other = copy.deepcopy(small)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(small))  # noqa: S301  # our own
    else:
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(small) is type(other) is transformers.BertForSequenceClassification
    with torch.no_grad():
        small.classifier.bias.add_(1)
        other.classifier.bias.sub_(1)
    other.save_pretrained(tmp_path)
    close(outputs(load_export(tmp_path), family.inputs()), outputs(other, family.inputs()), 1e-12)


def test_widths_that_a_stock_config_says_are_saved_as_ever(tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family)
    for name in ("0.neurons", "1.neurons"):
        apt.set_block_mask(name, (torch.arange(20) < 7).float())
    small = shrink(apt)
    assert "save_pretrained" not in vars(small)
    small.save_pretrained(tmp_path)
    close(outputs(type(small).from_pretrained(tmp_path, dtype="auto"), family.inputs()), outputs(small, family.inputs()))
    more = get_apt_model(shrink(uneven("bert")[1]), APTConfig(r=1))  # and an uneven model that is adapted, evened and cut again is stock
    least = min(block.count for block in more.blocks.values() if block.kind == "neurons")
    for name, block in more.blocks.items():
        if block.kind != "hidden":
            more.set_block_mask(name, (torch.arange(block.count) < (least if block.kind == "neurons" else block.count)).float())
    heads = {block.count for block in more.blocks.values() if block.kind == "heads"}
    assert ("save_pretrained" in vars(shrink(more))) == (heads != {3})


def test_what_is_uploaded_is_what_is_saved(tmp_path, monkeypatch):
    _, apt = uneven("bert")
    small = shrink(apt)
    sent = []

    class Hub:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    card = type("Card", (), {"save": lambda self, path: None})()
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)

    def upload(self, directory, *_, **__):
        sent.append(load_export(directory))

    monkeypatch.setattr(type(small), "_upload_modified_files", upload)
    small.push_to_hub("me/small")
    (again,) = sent
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in small.state_dict().items())
    with pytest.raises(RuntimeError, match=r"push_to_hub: expected False, got True; call push_to_hub\(repo_id\)"):
        small.save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_and_other_classes_write_nothing(tmp_path):
    class Mine(transformers.BertForSequenceClassification):
        pass

    _, apt = uneven("bert")
    small = shrink(apt)
    small.save_pretrained(tmp_path, is_main_process=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory: expected a directory"):
        small.save_pretrained(tmp_path / "file")
    small.__class__ = Mine
    with pytest.raises(ValueError, match="expected a class of transformers, which load_export can make, got .*Mine"):
        small.save_pretrained(tmp_path / "own")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# -- the model inside an APTModel --------------------------------------------------------------------------------------


def trained_by_trainer(model, directory):
    pytest.importorskip("accelerate")
    tokens = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(tokens)]
    arguments = transformers.TrainingArguments(
        str(directory),
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=4,
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()


def test_a_trainer_of_the_model_inside_saves_the_adapters(tmp_path, caplog):
    family = FAMILIES["bert"]
    torch.use_deterministic_algorithms(False)
    apt = get_apt_model(family.model(torch.float32), APTConfig(r=2))
    before = outputs(apt.eval(), family.inputs())
    apt.set_block_mask("1.neurons", (torch.arange(20) < 7).float())
    trained_by_trainer(apt.model, tmp_path)
    last = tmp_path / "checkpoint-2"
    names = {file.name for file in last.iterdir()}
    assert names >= ADAPTER_FILES and not {"model.safetensors", "config.json"} & names
    assert len(said(caplog, "wrote the adapters of BertForSequenceClassification and not its base weights")) == 1
    again = APTModel.from_pretrained(family.model(torch.float32), last).eval()
    close(outputs(again, family.inputs()), outputs(apt.eval(), family.inputs()), 0.0)
    assert (outputs(again, family.inputs())[0] - before[0]).abs().max() > 1e-3


def test_a_trainer_of_a_cut_model_saves_what_load_export_reads(tmp_path):
    family, apt = uneven("bert")
    torch.use_deterministic_algorithms(False)
    small = shrink(apt).float()
    trained_by_trainer(small, tmp_path)
    last = tmp_path / "checkpoint-2"
    assert {file.name for file in last.iterdir()} >= OWN_FILES
    close(outputs(load_export(last), family.inputs()), outputs(small.eval(), family.inputs()), 1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("how", ["itself", "deepcopy", "inside", "pickle", "alone"])
def test_the_model_inside_saves_itself_however_it_was_copied(name, how, tmp_path):
    family = FAMILIES[name]
    apt = adapted(family)
    if how == "deepcopy":
        apt = copy.deepcopy(apt)
    elif how == "pickle":
        apt = pickle.loads(pickle.dumps(apt))  # noqa: S301  # our own
    inner = copy.deepcopy(apt.model) if how == "inside" else apt.model
    with torch.no_grad():
        for _, adapter in apt_ext.adapters(inner):
            adapter.lora_B.mul_(2)
    expected = outputs(inner, family.inputs())
    if how == "alone":
        del apt
    inner.save_pretrained(tmp_path, state_dict={}, safe_serialization=True, max_shard_size="1GB")
    close(outputs(APTModel.from_pretrained(family.model(), tmp_path).eval(), family.inputs()), expected)
    inner.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()


def test_adapters_are_not_uploaded(tmp_path):
    """push_to_hub sends an export: tests/exporting/test_push.py."""
    apt = adapted(FAMILIES["bert"])
    with pytest.raises(
        RuntimeError, match=r"push_to_hub: expected False, got True, .*; call push_to_hub\(repo_id\), which sends an export"
    ):
        apt.model.save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["controller", "load"])
def test_the_model_inside_saves_the_target_of_an_apt_model_that_is_gone(how, tmp_path):
    apt = adapted(FAMILIES["bert"])
    apt.target = Target(0.5)
    if how == "load":
        state, apt = apt.state_dict(), adapted(FAMILIES["bert"])
        apt.load_state_dict(state)
    inner, copied = apt.model, copy.deepcopy(apt.model)
    del apt
    for number, model in enumerate((inner, copied)):
        model.save_pretrained(tmp_path / str(number))
        assert APTModel.from_pretrained(FAMILIES["bert"].model(), tmp_path / str(number)).target == Target(0.5)


def test_a_model_without_adapters_saves_as_a_stock_one(tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family)
    assert not {"save_pretrained", "push_to_hub"} & vars(shrink(apt)).keys()
    plain = apt.merge_and_unload()
    assert not {"save_pretrained", "push_to_hub"} & vars(plain).keys()
    plain.save_pretrained(tmp_path)
    close(outputs(type(plain).from_pretrained(tmp_path, dtype="auto"), family.inputs()), outputs(plain, family.inputs()))
    model = family.model()
    with pytest.raises(ValueError, match="rank must be at most"):
        get_apt_model(model, APTConfig(r=25))
    assert not {"save_pretrained", "push_to_hub"} & vars(model).keys()
    small = shrink(uneven("bert")[1])
    back = get_apt_model(small, APTConfig(r=1)).merge_and_unload()
    back.save_pretrained(tmp_path / "own")
    close(outputs(load_export(tmp_path / "own"), family.inputs()), outputs(back, family.inputs()), 1e-12)


@pytest.mark.usefixtures("loaded_here")
def test_export_writes_its_own_files_whatever_the_instance_saves(tmp_path):
    _, apt = uneven("bert")
    assert export(shrink(apt), tmp_path / "own", per_layer=True) == "apt_ext.load_export"
    assert {file.name for file in (tmp_path / "own").iterdir()} == OWN_FILES | CARD


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_the_model_inside_calls_the_model_around_it(how, monkeypatch):
    apt = adapted(FAMILIES["bert"])
    if how != "itself":
        apt = copy.deepcopy(apt) if how == "deepcopy" else pickle.loads(pickle.dumps(apt))  # noqa: S301  # our own
    seen = []
    monkeypatch.setattr(APTModel, "save_pretrained", lambda self, path: seen.append(self))
    apt.model.save_pretrained("somewhere")
    assert seen[0] is apt
