"""A model with adapters that looks like the stock model inside to code that asks for a class or a signature, such as Trainer."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_made: WeakKeyDictionary[type, dict[type, type]] = WeakKeyDictionary()  # {stock class: {our class: the one with its name}}


class LooksStock(nn.Module):
    """A module around `model` whose class has the name, and whose forward the signature, of the model's.

    The class of an instance is made for the class of its model. It is a subclass of the one that was called, and copies and
    pickles find it again.
    """

    model: nn.Module

    def __new__(cls, model: nn.Module | None = None, *_: Any, **__: Any) -> LooksStock:
        return super().__new__(cls if model is None else class_for(cls, type(model)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

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
        of_stock[kind] = type(stock.__name__, (kind,), names)
    return of_stock[kind]
