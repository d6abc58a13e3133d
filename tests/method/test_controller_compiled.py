"""A Controller over a compiled model: the eager run, and few compilations."""

import pytest
import torch
from families import FAMILIES
from training import batch_for, built, state_of, train

from apt_ext import Controller, adapters

# torch's own, where a graph goes on after a hook
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
LONGER = {"schedule": {"start": 2, "end": 20, "events": 3}}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("llama", "ran"),
        ("bert", "after"),
        *(slow(name, compiled) for name in ("bert", "llama") for compiled in ("before", "inside")),
        slow("llama", "after"),
        slow("bert", "ran"),
    ],
)
def test_compiled_before_or_after(name, compiled):
    """The eager run; it compiles for the first batch, the first pruning and the end, and not as masks move and ranks grow."""
    family = FAMILIES[name]
    (apt, optimizer), (plain, its) = (built(family, sizes={"num_hidden_layers": 1}, max_rank=16) for _ in range(2))
    model = apt
    if compiled == "inside":
        apt.model.compile(backend="aot_eager")
    elif compiled != "after":
        model = torch.compile(apt, backend="aot_eager")
    if compiled == "ran":
        model(**batch_for(family, 99)).loss.backward()
        apt.zero_grad()
    controller, eager = Controller(model, optimizer, 24, **LONGER), Controller(plain, its, 24, **LONGER)
    if compiled == "after":
        model = torch.compile(apt, backend="aot_eager")
    first, _, end = controller.steps.events
    changes, ranks = [], set()
    for step in range(24):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        train(model, optimizer, controller, family, 1, first=step)
        train(plain, its, eager, family, 1, first=step)
        if torch._dynamo.utils.counters["stats"]["unique_graphs"] > before:
            changes.append(step)
        ranks |= {adapter.rank for _, adapter in adapters(apt)}
        for block in apt.blocks:
            assert torch.equal(apt.get_block_mask(block), plain.get_block_mask(block)), (step, block)
    assert controller.done and len(ranks) > 2 and any(adapter.compacted for _, adapter in adapters(apt))
    assert changes[0] == 0 and set(changes) <= {0, 1, first, end}, changes  # at 1 gradients are no longer new
    ours, theirs = state_of(apt), state_of(plain)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, at=key: f"{at}: {text}")


def test_one_graph_is_torchs_error_while_it_listens_and_right_afterwards():
    family = FAMILIES["bert"]
    apt, optimizer = built(family, sizes={"num_hidden_layers": 1})
    model = torch.compile(apt, backend="aot_eager", fullgraph=True)
    controller = Controller(model, optimizer, 16)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(**batch_for(family, 0))
    controller.remove()
    torch.testing.assert_close(model(**batch_for(family, 0)).loss, apt(**batch_for(family, 0)).loss)
