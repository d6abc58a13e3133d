"""What an export does while it saves: it hashes the model's tensors, once, and brings files to the disk; an error ends both."""

import hashlib
import threading
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, adapted
from tiny_bert import masked

from apt_ext import export, shrink
from apt_ext.exporting import directories, reload
from apt_ext.storage import atomic_dir

transformers = pytest.importorskip("transformers")


@pytest.fixture
def hashed(monkeypatch):
    """What has been hashed, in this order, and an event by which hashing waits."""
    found, go, real = [], threading.Event(), reload._sha256
    monkeypatch.setattr(reload, "_sha256", lambda tensor: (go.wait(20), found.append(tuple(tensor.shape)), real(tensor))[2])
    return found, go


@pytest.mark.usefixtures("loaded_here")
def test_tensors_are_hashed_while_the_files_are_written(tmp_path, monkeypatch, hashed):
    found, go = hashed
    save, digests, begun = directories.save_stock, reload.digests, threading.Event()
    monkeypatch.setattr(reload, "digests", lambda *arguments: (begun.set(), digests(*arguments))[1])

    def saves(*arguments):
        assert begun.wait(20) and not found, "it waits for this one's files here, so neither waits for the other"
        save(*arguments)
        go.set()

    monkeypatch.setattr(directories, "save_stock", saves)
    export(masked({}), tmp_path / "small")
    assert found


def test_tensors_are_hashed_once_for_all_loaders(tmp_path, monkeypatch):
    asked, digests = [], reload.digests
    monkeypatch.setattr(reload, "digests", lambda *arguments: (asked.append(1), digests(*arguments))[1])
    loaders = []

    def reloaded(directory, loader, exchange):
        loaders.append((loader, exchange.is_file()))
        torch_file.save_file({"output": torch_file.load_file(exchange)["expected"]}, exchange)
        return {"tensors": ours}

    from safetensors import torch as torch_file

    apt = adapted(FAMILIES["llama"])
    apt.set_block_mask("0.heads", torch.tensor([1.0, 0, 0]))
    small = shrink(apt)
    ours = digests(reload.listed(small))
    monkeypatch.setattr(directories, "started", lambda kind: nullcontext(reloaded))
    monkeypatch.setattr(directories, "probe", lambda model: ({"expected": torch.ones(2)}, torch.ones(2)))
    assert export(small, tmp_path / "small", per_layer=True) == "apt_ext.load_export"
    assert loaders == [("apt_ext", True), ("AutoModelForCausalLM", True)] and asked == [1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_of_saving_ends_the_hashing(tmp_path, monkeypatch, hashed, error):
    found, go = hashed
    monkeypatch.setattr(directories, "started", nullcontext)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = threading.active_count()

    def fails(*_, **__):
        threading.Timer(0.3, go.set).start()  # by then the export has told the others that it ends
        raise error("no place")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fails)
    small = shrink(masked({}))
    with pytest.raises(error, match="no place"):
        export(small, tmp_path / "small")
    assert len(found) <= 1 and threading.active_count() <= before + 1 and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("loaded_here")
def test_what_cannot_be_brought_to_the_disk_early_is_an_error(tmp_path, monkeypatch):
    """The kernel tells of a lost page once, to the first who asks: a later fsync may see none."""

    def fails(directory, ended):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_dir, "flush", fails)
    with pytest.raises(OSError, match="Input/output"):
        export(masked({}), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("loaded_here")
def test_a_forward_that_changes_a_buffer_is_no_difference(tmp_path, monkeypatch):
    forward = transformers.BertModel.forward

    def counts(self, *arguments, **options):
        self.embeddings.position_ids.clamp_(max=1)
        return forward(self, *arguments, **options)

    small = shrink(masked({}))
    monkeypatch.setattr(transformers.BertModel, "forward", counts)
    export(small, tmp_path / "small")


def tensors(device):
    whole = torch.arange(3000, dtype=torch.float32, device=device).reshape(30, 100)
    odd = {"transposed": whole.T, "part": whole[1:, ::3], "none": whole[:0], "scalar": whole[3, 3], "half": whole.bfloat16()}
    return {"whole": whole, **odd, "bool": whole > 7, "complex": torch.view_as_complex(whole.reshape(-1, 2)), "again": whole}


def test_a_digest_is_of_the_values_in_their_order(device, monkeypatch):
    monkeypatch.setattr(reload, "_PIECE", 1000)  # of a copy from a GPU: some tensors are many
    found, said = tensors(device), reload.digests(tensors(device))
    for name, tensor in found.items():
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert said[name] == [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()], name


def test_hashing_that_was_ended_gives_no_answer():
    ended = threading.Event()
    ended.set()
    with pytest.raises(RuntimeError, match="digests: expected to hash all tensors"):
        reload.digests(tensors("cpu"), ended)


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.parametrize("before", ["nothing", "an export"])
def test_what_others_put_there_meanwhile_is_not_replaced(tmp_path, monkeypatch, before):
    target, save = tmp_path / "small", directories.save_stock
    if before == "an export":
        export(masked({}), target)

    def saves(*arguments):
        save(*arguments)
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")

    monkeypatch.setattr(directories, "save_stock", saves)
    with pytest.raises(ValueError, match="with other content"):
        export(masked({}), target)
    assert (target / "notes.txt").read_text() == "mine" and list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("loaded_here")
def test_an_export_of_others_meanwhile_is_replaced(tmp_path, monkeypatch):
    target, save = tmp_path / "small", directories.save_stock
    export(masked({}), target)

    def saves(*arguments):
        save(*arguments)
        monkeypatch.setattr(directories, "save_stock", save)
        export(masked({}), target)

    monkeypatch.setattr(directories, "save_stock", saves)
    export(masked({}), target)
    assert atomic_dir.unchanged(target, directories.MANIFEST) and list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("loaded_here")
def test_a_model_of_nan_is_refused_as_one(tmp_path):
    apt = masked({})
    with torch.no_grad():
        apt.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights may hold NaN"):
        export(apt, tmp_path / "small")
    assert not list(tmp_path.iterdir())
