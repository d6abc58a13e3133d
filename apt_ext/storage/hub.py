"""Send a model to the Hub of Hugging Face. What is sent is an export, so what is sent loads again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..common.checks import checked_bool
from ..common.extras import lacking

# Of earlier pushes: a stock class would find them beside what is sent now.
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "apt_w*", "apt_export.json", "modeling_apt.py"]
_exporters: list[Callable[..., str]] = []


def export_with(exporter: Callable[..., str]) -> None:
    """Let `send` write by this function; it stands in a room above."""
    _exporters[:] = [exporter]


def send(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    per_layer: bool = False,
    unfinished: bool = False,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Export `model` and upload the directory; what `APTModel.push_to_hub` promises."""
    text = {"repo_id": repo_id, "token": token, "commit_message": commit_message, "revision": revision}
    for name, value in text.items():
        if value is not None and not isinstance(value, str) or (name == "repo_id" and value is None):
            raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    checked_bool("create_pr", create_pr)
    if private is not None:
        checked_bool("private", private)
    api = _checked_api(repo_id, token)
    with _worded(api, "expected a token that the Hub knows"):
        api.whoami()
    options = {"tokenizer": tokenizer, "max_shard_size": max_shard_size, "per_layer": per_layer, "unfinished": unfinished}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        _exporters[0](model, directory, repo_id, call="push_to_hub", metrics=metrics, **options)
        with _worded(api, f"expected the Hub to take {repo_id!r}"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or "Upload a model pruned by apt_ext",
                revision=revision,
                create_pr=create_pr,
                delete_patterns=_WEIGHTS,
            )
    return str(commit)


def _checked_api(repo_id: str, token: str | None) -> Any:
    """The client. ImportError, ValueError and RuntimeError say what it lacks."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ImportError(lacking("push_to_hub", "huggingface_hub", error)) from error
    try:
        huggingface_hub.hf_hub_url(repo_id, "config.json")
    except HFValidationError as error:
        raise ValueError(f"repo_id: expected a name such as 'you/model', got {repo_id!r:.200}: {error}") from None
    if huggingface_hub.is_offline_mode():
        raise RuntimeError("push_to_hub: expected to be online, but HF_HUB_OFFLINE is set; unset it")
    found = token or huggingface_hub.get_token()
    if not found:
        raise RuntimeError("push_to_hub: expected a token of the Hub, found none; run `hf auth login`, set HF_TOKEN, or give token=")
    return huggingface_hub.HfApi(token=found)


@contextmanager
def _worded(api: Any, expected: str) -> Iterator[None]:
    """RuntimeError for whatever the client raises: its HTTP library and its classes are its own affair."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"push_to_hub: {expected}, got from {api.endpoint}: {said}") from error
