"""A whole model with adapters: build it, mask its blocks, save and load what was trained, and get an ordinary model back."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import APTAdapter
from .config import APTConfig, nearest, select
from .structure.architectures import Block, find_blocks, is_linear, output_layer, task_heads
from .structure.blocks import MaskedLinear, get_mask, merged_linear, set_mask

CONFIG_FILE = "apt_config.json"
TENSORS_FILE = "apt_model.safetensors"
_FORMAT = 1  # of the two files
_MOST_TEXT = 1 << 20  # bytes of a configuration, and of what a header holds beside its tensors' entries

# They hand the weights of their linears to a fused function, so an adapter's forward would never be called.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def adapters(model: nn.Module) -> Iterator[tuple[str, APTAdapter]]:
    """(name, adapter) of every adapter in an APTModel or any other module, rank-0 carriers of masks included.

    Names are those before wrapping, "bert.encoder.layer.0.attention.self.query", also where DDP or torch.compile holds the APTModel.
    """
    prefix = ""
    for name, module in model.named_modules():
        if isinstance(module, APTModel):
            prefix = f"{name}.model." if name else "model."
        elif isinstance(module, APTAdapter):
            yield name.removeprefix(prefix), module


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every trainable Parameter that has entries, each once, in the order of the modules: factors and modules_to_save."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]


def get_apt_model(model: nn.Module, config: APTConfig) -> APTModel:
    """Put adapters into `model`, in place, and freeze everything but them and `config.modules_to_save`.

    Every linear of a prunable block is wrapped as well, with rank 0 if it is no target: masks change later without changing the modules.

    Raises TypeError (not a module, a quantised or fused linear), ValueError (a name that matches nothing, with the nearest names; a rank
    that does not fit; a weight that is tied or not finite; a model with adapters), naming the module; the model is then as before.
    """
    return _build(model, config, lambda apt: None)


class APTModel(nn.Module):
    """A model with adapters; made by `get_apt_model` or `APTModel.from_pretrained`. `forward` and unknown attributes are the model's own.

    model       the model itself, with adapters in the place of linears
    apt_config  the APTConfig that it was built with
    blocks      {name: Block}: what can be pruned; "<layer>.neurons" are the neurons of one feed-forward layer
    saved       the names of the modules that train whole
    """

    def __init__(self, model: nn.Module, config: APTConfig, blocks: dict[str, Block], saved: list[str]) -> None:
        super().__init__()
        self.model = model
        self.apt_config = config
        self.blocks = blocks
        self.saved = saved

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # copy and pickle look for special methods, and for anything on an object that has no model yet: those are not the model's
            if name == "model" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    # -- blocks ------------------------------------------------------------------------------------------------------

    def set_block_mask(self, name: str, mask: Tensor) -> None:
        """Mask block `name` consistently on every linear that it touches; a fractional value acts once.

        mask [count], floating, values in [0, 1], any device. Nothing has changed when this raises ValueError (unknown name, shape, value),
        TypeError, or RuntimeError (an adapter of the block is merged).
        """
        set_mask(self.model, name, self._block(name), mask)

    def get_block_mask(self, name: str) -> Tensor:
        """A copy of the mask of block `name`, float32 [count]. ValueError for an unknown name."""
        return get_mask(self.model, self._block(name))

    def _block(self, name: str) -> Block:
        if name not in self.blocks:
            near = nearest(str(name), self.blocks) or "; this model has none: its architecture is not in the table"
            raise ValueError(f"name: expected a block of this model, got {name!r}{near}")
        return self.blocks[name]

    # -- counting ----------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) entries; rows that max_rank reserves and the rank does not use yet count in neither."""
        reserved = sum(a.lora_A.numel() + a.lora_B.numel() - a.get_parameter_count() for _, a in adapters(self))
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trainable - reserved, sum(parameter.numel() for parameter in self.parameters()) - reserved

    def print_trainable_parameters(self) -> None:
        """Print them as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / max(total, 1):.4f}")

    # -- the base model ----------------------------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context every adapter is the model's own linear, without masks; a merged one is unmerged and merged again after.

        Modules that train whole (modules_to_save) stay as they are trained.
        """
        entered = [(adapter, adapter._disabled, adapter.merged, adapter._keep) for _, adapter in adapters(self)]
        try:
            for adapter, _, _, _ in entered:
                adapter.unmerge_weights()
                adapter._disabled = True
            yield
        finally:
            for adapter, disabled, _, _ in entered:
                adapter._disabled = disabled
            for adapter, _, merged, keep in entered:
                if merged:
                    adapter.merge_weights(keep)

    def merge_and_unload(self) -> nn.Module:
        """The model itself with adapters and masks merged into its linears, which are back in their places; full shapes, frozen as it was.

        This APTModel has no adapters and no blocks afterwards. RuntimeError where a merged weight would not be finite; all is then as
        before. The original weights are held in host memory meanwhile.
        """
        found = list(adapters(self))
        merged_before = [adapter.merged for _, adapter in found]
        try:
            for name, adapter in found:
                with naming(name):
                    adapter.merge_weights(keep="cpu")
        except BaseException:
            for (_, adapter), merged in zip(found, merged_before, strict=True):
                if not merged:
                    adapter.unmerge_weights()
            raise
        for name, adapter in found:
            self.model.set_submodule(name, merged_linear(adapter))
        self.blocks = {}
        return self.model

    # -- save and load -----------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write apt_config.json and apt_model.safetensors into the directory `path`: adapters, masks and the modules that train whole.

        Both are complete on the disk before they take the place of older ones, each in one step; other files there stay. With an unchanged
        configuration an interruption leaves the old state or the new; otherwise the loader notices two files that do not belong together.
        ValueError where `path` is a file; OSError (disk full) leaves what was there.
        """
        from safetensors.torch import save

        directory = Path(path)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"path: expected a directory or a missing one, got a file: {directory}")
        config = json.dumps({"format": _FORMAT, **self.apt_config.to_dict()}, indent=2) + "\n"
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in self._own_state().items()}
        with sibling_directory(directory) as temporary:
            (temporary / TENSORS_FILE).write_bytes(save(tensors, {"apt_config": config}))
            (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
            sync(temporary)
            directory.mkdir(parents=True, exist_ok=True)
            for name in (TENSORS_FILE, CONFIG_FILE):
                os.replace(temporary / name, directory / name)
            sync(directory, files=False)

    @classmethod
    def from_pretrained(cls, base_model: nn.Module, path: str | os.PathLike[str]) -> APTModel:
        """`base_model` with the adapters that `save_pretrained` wrote to the directory `path`, in place as in `get_apt_model`.

        The files are read into memory, no larger than this model explains; pickle is never read. Raises ValueError naming the file when it
        is missing, damaged or made for another model; `base_model` is then as before.
        """
        directory = Path(path)
        with naming(str(directory / CONFIG_FILE), ValueError):
            text, config = _read_config(directory / CONFIG_FILE)

        def load(apt: APTModel) -> None:
            with naming(str(directory / TENSORS_FILE), ValueError):
                apt._load(_read_tensors(directory / TENSORS_FILE, apt._own_state(), text))

        return _build(base_model, config, load)

    def _own_state(self) -> dict[str, Tensor]:
        """What belongs in a checkpoint, with the keys of the model's state_dict: adapters without their frozen bases, and `saved`."""
        own = tuple(f"{name}." for name, _ in adapters(self))
        saved = tuple(f"{name}." for name in self.saved)
        state = self.model.state_dict()
        return {key: value for key, value in state.items() if key.startswith(saved) or (key.startswith(own) and ".base_layer." not in key)}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `_read_tensors` found good; a value that an adapter refuses leaves `saved` as it was (the adapters are new)."""
        saved = {key: value.clone() for key, value in self._own_state().items() if key.startswith(tuple(f"{name}." for name in self.saved))}
        try:
            self.model.load_state_dict(tensors, strict=False)
        except BaseException:
            for _, adapter in adapters(self):
                adapter.unmerge_weights()
            self.model.load_state_dict(saved, strict=False)
            raise


def _build(model: nn.Module, config: APTConfig, then: Callable[[APTModel], None]) -> APTModel:
    """Wrap `model` and call `then` on the result; whatever raises, the model has its own linears and flags again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(config, APTConfig):
        raise TypeError(f"config: expected an APTConfig, got {type(config).__name__}")
    if isinstance(model, APTModel) or any(True for _ in adapters(model)):
        raise ValueError("model: expected a model without adapters, got one that has them; merge_and_unload() gives it back")
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    saved = task_heads(model) if config.modules_to_save is None else select("modules_to_save", config.modules_to_save, names)
    inside = tuple(f"{name}." for name in saved)
    linears = [name for name in names if is_linear(modules[name])]
    whole = {name for name in linears if name in saved or name.startswith(inside)}
    targets = config.targets(linears, whole, output_layer(model))
    blocks = find_blocks(model)
    touched = {linear for block in blocks.values() for linear in block.linears}
    _check_targets(model, targets)

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    apt = APTModel(model, config, blocks, saved)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name in saved:
            for parameter in modules[name].parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        for name in linears:
            if name in targets or name in touched:
                with naming(name):
                    if name in whole:
                        adapter: APTAdapter = MaskedLinear.around(modules[name])
                    else:
                        rank = config.rank_of(name) if name in targets else 0
                        reserved = config.max_rank if name in targets else None
                        adapter = APTAdapter.from_linear(
                            modules[name], rank, config.scaling_of(name), max_rank=reserved, dropout=config.lora_dropout
                        )
                model.set_submodule(name, adapter)
        then(apt)
    except BaseException:
        for name in linears:
            model.set_submodule(name, modules[name])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return apt


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    """A target's weight must be its own, and its forward must be what its parent calls."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in targets:
        tied = owners[id(model.get_submodule(name).weight)]
        if len(tied) > 1:
            raise ValueError(f"target_modules: expected weights of their own, but the weight of {name} is tied: {' = '.join(tied)}")
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, _READ_WEIGHTS):
            raise TypeError(
                f"target_modules: expected linears that are called, but {type(parent).__name__} reads the weight of {name} itself, "
                "so an adapter there would be ignored; leave it out with exclude_modules"
            )


@contextmanager
def naming(name: str, kind: type[Exception] | None = None) -> Iterator[None]:
    """Worded errors within this context begin with `name`; with `kind` they become that, whatever they were."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if kind is None and type(error) not in (ValueError, TypeError, RuntimeError):
            raise
        raise (kind or type(error))(f"{name}: {error}") from error


# -- files -------------------------------------------------------------------------------------------------------------


@contextmanager
def sibling_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, so in the same file system, where a rename is one step; gone with its contents afterwards."""
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(directory: Path, files: bool = True) -> None:
    """Have the directory's entries, and its files, on the disk when this returns."""
    for path in [*(directory.iterdir() if files else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _regular_size(file: Path) -> int:
    if not file.is_file():
        raise ValueError("expected a regular file, found none")
    return file.stat().st_size


def _read_config(file: Path) -> tuple[str, APTConfig]:
    """The text of apt_config.json and what it says."""
    if _regular_size(file) > _MOST_TEXT:
        raise ValueError(f"expected at most {_MOST_TEXT} bytes, got {_regular_size(file)}")
    text = file.read_text(encoding="utf-8")
    values = _json_object(text)
    if (version := values.pop("format", None)) != _FORMAT:
        raise ValueError(f'expected "format": {_FORMAT}, which this version of apt_ext reads, got {version!r}')
    return text, APTConfig.from_dict(values)


def _read_tensors(file: Path, expected: dict[str, Tensor], config_text: str) -> dict[str, Tensor]:
    """The tensors of a file with the names and shapes of `expected`, but for the ranks, which may be any that the linears allow.

    ValueError otherwise. The header is judged before the data is read, so no more is read than the model explains.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = _regular_size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        most = 2 * _MOST_TEXT + 300 * len(expected)
        if len(start) < 8 or length > min(most, size - 8):
            raise ValueError(f"expected a safetensors header of at most {min(most, max(size - 8, 0))} bytes, got {length}")
        header = stream.read(length)
        found = _json_object(header.decode("utf-8"))
        metadata = found.pop("__metadata__", {})
        if isinstance(metadata, dict) and metadata.get("apt_config", config_text) != config_text:
            raise ValueError(f"expected the {CONFIG_FILE} that was written with it, got another: they come from different saves")
        if found.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
            raise ValueError(
                f"expected the tensors of this model: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        entries = 0
        for name, value in expected.items():
            shape = found[name].get("shape") if isinstance(found[name], dict) else None
            entries += _checked_entries(name, shape, value)
        if size > 8 + length + 8 * entries:
            raise ValueError(f"expected at most {8 * entries} bytes of data for its shapes, got {size - 8 - length}")
        data = stream.read(size - 8 - length)
    try:
        tensors = load(start + header + data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, value in expected.items():
        got = tensors[name].dtype
        if got != value.dtype and not (got.is_floating_point and value.is_floating_point()):
            raise ValueError(f"{name}: expected dtype {value.dtype}, got {got}")
    return tensors


def _checked_entries(name: str, shape: Any, like: Tensor) -> int:
    """The number of entries of `shape`, which must be `like`'s, except that a factor may have any rank that its linear allows."""
    free = {"lora_A": 0, "lora_B": 1}.get(name.rpartition(".")[2])
    good = isinstance(shape, list) and len(shape) == like.dim()
    for dim, size in enumerate(like.shape if good else ()):
        fits = type(shape[dim]) is int and (0 <= shape[dim] <= max(like.shape) if dim == free else shape[dim] == size)
        good = good and fits
    if not good:
        expected = [("rank" if dim == free else size) for dim, size in enumerate(like.shape)]
        raise ValueError(f"{name}: expected shape {expected}, got {shape}")
    return math.prod(shape)


def _json_object(text: str) -> dict[str, Any]:
    """A JSON object none of whose objects has a key twice; ValueError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("expected each key once in a JSON object, got one twice")
        return values

    values = json.loads(text, object_pairs_hook=unique)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values
