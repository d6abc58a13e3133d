"""APTAdapter: a frozen linear layer, a low-rank path beside it and one mask a side."""

from .layer import APTAdapter

__all__ = ["APTAdapter"]
