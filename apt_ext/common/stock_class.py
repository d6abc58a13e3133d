"""A model with adapters that looks like the stock model inside to code that asks for a class or a signature, such as Trainer.

Trainer, accelerate and TRL ask `isinstance(model, PreTrainedModel)` before they save. So the class of an APTModel around one
derives from PreTrainedModel, and every attribute that comes from there is the inner model's own.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_PRETRAINED = ("transformers.modeling_utils", "PreTrainedModel")
_OF_TORCH = {"__init__", "cuda", "eval", "float", "half", "to", "train"}  # what PreTrainedModel overrides and a wrapper must not

_made: WeakKeyDictionary[type, dict[type, type]] = WeakKeyDictionary()  # {stock class: {our class: the one with its name}}


class LooksStock(nn.Module):
    """A module around `model` whose class has the name, and whose forward the signature, of the model's.

    The class of an instance is made for the class of its model. It is a subclass of the one that was called, and copies and
    pickles find it again.
    """

    model: nn.Module

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not that of PreTrainedModel, which may stand between

    def __new__(cls, model: nn.Module | None = None, *_: Any, **__: Any) -> LooksStock:
        return super().__new__(cls if model is None else class_for(cls, type(model)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is read from the model there (config, generation_config), and all else here."""
        ours = vars(self)
        model = ours.get("_modules", {}).get("model")
        registered = any(name in ours.get(where, ()) for where in ("_modules", "_parameters", "_buffers"))
        if model is not None and not (name in ours or registered or hasattr(type(self), name)) and hasattr(model, name):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return empty, (own_class(type(self)), type(self.model)), self.__getstate__()  # type: ignore[no-untyped-call]


def own_class(kind: type) -> type:
    """Return the class that `class_for` was given for `kind`; a class that was not made so is its own."""
    return kind.__mro__[1] if "made_for" in vars(kind) else kind


def empty(kind: type, stock: type) -> Any:
    """Return an instance of `kind` for a model of the class `stock`, without anything in it: what a pickle begins with."""
    made = class_for(kind, stock)
    return nn.Module.__new__(made)


def class_for(kind: type, stock: type) -> type:
    """Return the subclass of `kind` that has the name and the forward signature of `stock`; of one that was made so, itself."""
    kind = own_class(kind)
    of_stock = _made.setdefault(stock, {})
    if kind not in of_stock:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

        forward.__doc__ = "The model's own."
        with suppress(TypeError, ValueError):  # one of torch.jit or of C++ has none
            forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward, "made_for": stock.__name__}
        pretrained = next((base for base in stock.__mro__ if (base.__module__, base.__name__) == _PRETRAINED), None)
        bases = (kind,) if pretrained is None else (kind, _forwarding(pretrained, stock))
        of_stock[kind] = type(stock.__name__, bases, names)
    return of_stock[kind]


def _forwarding(pretrained: type, stock: type) -> type:
    """Return a subclass of PreTrainedModel in which nothing is PreTrainedModel's: torch's where torch has it, else the inner model's."""
    ours: dict[str, Any] = {name: getattr(nn.Module, name) for name in vars(pretrained) if name in _OF_TORCH}
    forwarded = (name for name in dir(pretrained) if not hasattr(nn.Module, name))
    ours |= {name: _Forwarded(stock, name) for name in forwarded}
    ours["__init_subclass__"] = classmethod(lambda cls, **_: None)  # PreTrainedModel's reads annotations, of ours too
    ours["__module__"], ours["__doc__"] = __name__, "PreTrainedModel to those who ask for the class; no code of it runs."
    return type("Forwarding", (pretrained,), ours)


class _Forwarded:
    """An attribute that the model inside has; of the class, what the stock class has."""

    def __init__(self, stock: type, name: str) -> None:
        self._stock, self._name = stock, name

    def __get__(self, instance: Any, owner: type) -> Any:
        return getattr(self._stock if instance is None else instance.model, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.model, self._name, value)

    def __delete__(self, instance: Any) -> None:
        delattr(instance.model, self._name)
