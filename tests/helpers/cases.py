"""Products of parameters of which every day's run takes a part that has each value, and the nightly run all."""

from itertools import product

import pytest


def turn(name, names, values):
    """The one of ``values`` whose turn it is at ``name`` among ``names``."""
    return list(values)[list(names).index(name) % len(values)]


def crossed(*values, daily):
    """pytest's parameters for all combinations; those for which ``daily`` does not hold are marked slow."""
    return [pytest.param(*case, id="-".join(map(_name, case)), marks=() if daily(*case) else pytest.mark.slow) for case in product(*values)]


def _name(value):
    return "+".join(value) if isinstance(value, tuple) else str(value)
