"""The search for what stays under a budget, under its public name."""

from .select.search import Group, search

__all__ = ["Group", "search"]
