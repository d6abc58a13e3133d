"""push_to_hub sends what loads again from there, to a stand-in of the Hub, in processes of their own."""

import json
import subprocess
import sys
import textwrap

import hub_server
import pytest
import torch
from families import FAMILIES, adapted, keep_first, mask_all, outputs, some

from apt_ext import shrink
from apt_ext.pruning.target import Target

transformers = pytest.importorskip("transformers")
pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub():
    with hub_server.running() as found:
        yield found


@pytest.fixture
def sending(hub, tmp_path, monkeypatch):
    """The client of this process talks to the stand-in, and to nobody else; exports are loaded in this process."""
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", hub.endpoint, raising=False)
    return hub


def loads(hub, tmp_path, repo, auto, expected, family, *, by_code=False):
    """Another process, without apt_ext, loads it from the stand-in by its name and computes the same; by code, and not without it."""
    torch.save((family.inputs(), expected), tmp_path / "expected.pt")
    script = """
        import sys, torch
        sys.modules["apt_ext"] = None
        import transformers
        repo, auto, by_code = sys.argv[1:]
        inputs, expected = torch.load("expected.pt")
        load = getattr(transformers, auto).from_pretrained
        if by_code:
            try:
                load(repo, dtype="auto")
            except OSError:
                pass
            else:
                raise AssertionError("it was loaded without its code")
        model = load(repo, dtype="auto", **({"trust_remote_code": True} if by_code else {}))
        with torch.no_grad():
            assert (model(**inputs).logits - expected).abs().max() <= 1e-9
    """
    command = [sys.executable, "-c", textwrap.dedent(script), repo, auto, "by code" if by_code else ""]
    environment = hub.environment(tmp_path / "home")
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("loaded_here")
def test_an_export_is_sent_and_loads_by_its_name(sending, tmp_path):
    family = FAMILIES["bert"]
    apt = keep_first(adapted(family), neurons=7)
    url = apt.push_to_hub("me/small", private=True, commit_message="The first", metrics={"accuracy": 0.5})
    files = sending.repositories["me/small"]["main"]
    assert url == f"{sending.endpoint}/me/small/commit/{hub_server.commit_of(files)}"
    assert sending.private["me/small"] is True and sending.commits["me/small"][0]["summary"] == "The first"
    assert {"config.json", "model.safetensors", "README.md", "provenance.json", "apt_export.json"} < files.keys()
    assert 'from_pretrained("me/small", dtype="auto")' in files["README.md"].decode()
    done = loads(sending, tmp_path, "me/small", "AutoModelForSequenceClassification", outputs(apt, family.inputs())[0], family)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("loaded_here")
def test_widths_of_their_own_are_sent_with_their_code_and_old_weights_go(sending, tmp_path):
    family = FAMILIES["llama"]
    apt = adapted(family)
    apt.push_to_hub("me/small")
    assert "model.safetensors" in sending.repositories["me/small"]["main"]
    sending.repositories["me/small"]["main"]["notes.txt"] = b"mine"
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), "hard"))
    with pytest.raises(ValueError, match="per_layer=True"):
        apt.push_to_hub("me/small")
    apt.push_to_hub("me/small", per_layer=True)
    files = sending.repositories["me/small"]["main"]
    assert "model.safetensors" not in files and files["notes.txt"] == b"mine"
    assert {"apt_weights.safetensors", "modeling_apt.py", "apt_widths.json"} < files.keys()
    expected = outputs(apt, family.inputs())[0]
    done = loads(sending, tmp_path, "me/small", "AutoModelForCausalLM", expected, family, by_code=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.usefixtures("loaded_here")
def test_a_branch_and_a_tokenizer(sending, tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "tokenizer_config.json").write_text("{}")

    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    apt.push_to_hub("me/small", revision="trial", tokenizer=Tokenizer())
    branches = sending.repositories["me/small"]
    assert "tokenizer_config.json" in branches["trial"] and branches["main"].keys() == {".gitattributes"}
    assert "AutoTokenizer.from_pretrained" in branches["trial"]["README.md"].decode()


@pytest.mark.usefixtures("loaded_here")
@pytest.mark.parametrize("gone", [False, True])
def test_the_model_inside_sends_the_same(sending, gone):
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    apt.push_to_hub("me/one")
    inner = apt.model
    if gone:
        del apt
    inner.push_to_hub("me/two")
    one, two = (sending.repositories[name]["main"] for name in ("me/one", "me/two"))
    assert one.keys() == two.keys() and one["model.safetensors"] == two["model.safetensors"]
    assert json.loads(two["config.json"])["intermediate_size"] == 7


@pytest.mark.usefixtures("loaded_here")
def test_the_method_of_a_shrunk_model_with_widths_of_its_own_sends_what_loads(sending, tmp_path):
    family = FAMILIES["bert"]
    apt = adapted(family)
    small = shrink(mask_all(apt, some(family, apt.blocks, ("neurons",), "hard")))
    small.push_to_hub("me/small")
    expected = outputs(small, family.inputs())[0]
    done = loads(sending, tmp_path, "me/small", "AutoModelForSequenceClassification", expected, family, by_code=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unfinished_model_is_not_sent(sending):
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=15)
    apt.target = Target(0.5)
    inner = apt.model
    for model in (apt, inner):
        with pytest.raises(RuntimeError, match=r"push_to_hub: the model is not finished: its masks keep 0\.\d+ .* density of 0.5"):
            model.push_to_hub("me/small")
    del apt, model
    with pytest.raises(RuntimeError, match="push_to_hub: the model is not finished"):
        inner.push_to_hub("me/small")
    assert sending.requests == []


@pytest.mark.usefixtures("loaded_here")
def test_an_unfinished_model_is_sent_when_told(sending):
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=15)
    apt.target = Target(0.5)
    apt.push_to_hub("me/small", unfinished=True)
    card = sending.repositories["me/small"]["main"]["README.md"].decode()
    assert "the target was 0.5 of the parameters, which was not reached" in card


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"repo_id": "a b"}, ValueError, "repo_id: expected a name such as 'you/model', got 'a b'"),
        ({"repo_id": 3}, TypeError, "repo_id: expected a str, got int"),
        ({"private": "yes"}, TypeError, "private must be a bool, got str"),
        ({"token": True}, TypeError, "token: expected a str, got bool"),
        ({"revision": 1}, TypeError, "revision: expected a str, got int"),
        ({"commit_message": b""}, TypeError, "commit_message: expected a str, got bytes"),
        ({"metrics": {"a": "b"}}, TypeError, "must be a number, got str"),
        (
            {"token": "hf_wrong"},
            RuntimeError,
            "push_to_hub: expected a token that the Hub knows, got from http://127.0.0.1.*: Invalid user token",
        ),
        ({"repo_id": "others/small"}, RuntimeError, "push_to_hub: expected the Hub to take 'others/small', got from .*403"),
    ],
)
@pytest.mark.usefixtures("loaded_here")
def test_what_cannot_be_sent_is_refused_in_words(sending, arguments, kind, words):
    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    with pytest.raises(kind, match=words):
        apt.push_to_hub(**{"repo_id": "me/small", **arguments})
    assert not sending.repositories


def test_without_a_token_or_online_or_the_client_a_sentence_says_what_to_do(hub, monkeypatch, tmp_path):
    import huggingface_hub

    apt = keep_first(adapted(FAMILIES["bert"]), neurons=7)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RuntimeError, match="expected a token of the Hub, found none; run `hf auth login`, set HF_TOKEN, or give token="):
        apt.push_to_hub("me/small")
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set; unset it"):
        apt.push_to_hub("me/small")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'push_to_hub needs huggingface_hub; run: python -m pip install "apt_ext\[hf\]"'):
        apt.push_to_hub("me/small")
    assert hub.requests == []
