"""Compiled and exported: one graph for life within max_rank, and the numbers of eager mode."""

import copy
import io

import pytest
import torch
from small_adapter import expected, make, masks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = APTAdapter.from_linear(nn.Linear(12, 16), 2, max_rank=12)
        self.second = APTAdapter.from_linear(nn.Linear(16, 9, bias=False), 1, max_rank=9, dropout=0.0)

    def forward(self, x, target):
        return F.mse_loss(self.second(torch.tanh(self.first(x))), target)


@BACKENDS
def test_a_training_step_is_one_graph_through_twenty_changes(backend):
    """Forward, loss, backward and optimizer, against the same run in eager mode."""
    torch.manual_seed(1)
    net = Net()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    optimizers = [torch.optim.AdamW([p for p in n.parameters() if p.requires_grad], lr=1e-2) for n in (net, twin)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(20):
            x, target = torch.randn(5, 12), torch.randn(5, 9)
            losses = []
            for function, optimizer in zip((compiled, twin), optimizers, strict=True):
                optimizer.zero_grad()
                loss = function(x, target)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            torch.testing.assert_close(*losses)
            changed = [torch.rand(12), (torch.rand(16) > 0.3).float(), torch.rand(9)]
            for n in (net, twin):
                n.first.set_masks(changed[0], changed[1])
                n.second.set_masks(changed[1], changed[2])
                torch.manual_seed(step)
                if n.first.rank < 12 and step % 2:
                    n.first.increase_rank(n.first.rank + 1)
                if n.second.rank < 9 and step % 3 == 0:
                    n.second.increase_rank(n.second.rank + 1)
    assert (net.first.rank, net.second.rank) == (12, 8)
    for (name, got), want in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@BACKENDS
def test_masks_written_back_to_ones_stay_in_the_graph(backend):
    """Eager mode skips masks of ones; a graph traced while they were ones must not."""
    adapter, x = make(dtype=torch.float32), torch.randn(4, 10)
    compiled = torch.compile(adapter, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m_in, m_out in ((torch.ones(10), torch.ones(7)), masks(), (torch.ones(10), torch.ones(7)), masks()):
            adapter.set_masks(m_in, m_out)
            torch.testing.assert_close(compiled(x), expected(adapter, x))


@BACKENDS
def test_growth_without_max_rank_is_seen_by_a_compiled_module(backend):
    """It re-allocates, so it recompiles; never the old shape."""
    adapter, x = make(dtype=torch.float32), torch.randn(4, 10)
    compiled = torch.compile(adapter, backend=backend)
    for rank in (3, 4, 6):
        adapter.increase_rank(rank)
        with torch.no_grad():
            adapter.lora_B.normal_()
        y = compiled(x)
        torch.testing.assert_close(y, expected(adapter, x))
        y.sum().backward()
        assert adapter.lora_A.grad.shape == (rank, 10)
        adapter.zero_grad()


@BACKENDS
def test_a_compiled_module_follows_a_merge_and_its_undoing(backend):
    adapter, x = make(dtype=torch.float32).eval(), torch.randn(4, 10)
    adapter.set_masks(*masks())
    compiled = torch.compile(adapter, backend=backend)
    want = adapter(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want)
        adapter.merge_weights()
        torch.testing.assert_close(compiled(x), want)
        adapter.unmerge_weights()


def test_masks_changed_between_a_compiled_forward_and_its_backward():
    adapter, x = make(dtype=torch.float32), torch.randn(4, 10)
    adapter.set_masks(*masks())
    y = torch.compile(adapter, fullgraph=True, backend="aot_eager")(x)
    adapter.set_masks(torch.zeros(10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_masks_changed_under_a_checkpoint_within_the_graph():
    """The compiler keeps the masks for its recomputation. (A compiled module within an eager checkpoint is not looked at.)"""
    adapter, x = make(dtype=torch.float32), torch.randn(4, 10, requires_grad=True)
    adapter.set_masks(*masks())
    compiled = torch.compile(lambda x: checkpoint(adapter, x, use_reentrant=False).sin(), fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(adapter(x).sin().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], want)
    y = compiled(x)
    adapter.set_masks(torch.zeros(10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- torch.export --------------------------------------------------------------------------------------------------------


def reloaded(program):
    """The program from its file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.11
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_export_of_an_adapter(dtype, strict, merged):
    adapter = make(dtype=dtype, max_rank=5).eval()
    adapter.set_masks(*masks())
    if merged:
        adapter.merge_weights()
    batch = torch.export.Dim("batch", min=2)
    x = torch.randn(4, 10).to(dtype)
    program = torch.export.export(adapter, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert merged or any("apt_ext.apt_linear" in name for name in names)
    module = reloaded(program)
    for size in (2, 4, 33):
        x = torch.randn(size, 10).to(dtype)
        torch.testing.assert_close(module(x), adapter(x), rtol=0, atol=0)


def test_an_exported_program_keeps_its_masks_as_buffers():
    """Other masks can be loaded into it; the adapter's later changes are its own."""
    adapter, x = make(max_rank=5).eval(), torch.randn(4, 10, dtype=torch.float64)
    module = reloaded(torch.export.export(adapter, (x,)))
    before = adapter(x)
    m_in, m_out = masks()
    adapter.set_masks(m_in, m_out)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)
    module.mask_in.copy_(m_in)
    module.mask_out.copy_(m_out)
    torch.testing.assert_close(module(x), adapter(x))


def test_export_of_a_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32
    )
    targets = ["query", "value", "intermediate.dense"]
    model = get_apt_model(transformers.BertForSequenceClassification(config), APTConfig(r=2, lora_alpha=4, target_modules=targets)).eval()
    for _, adapter in adapters(model):
        with torch.no_grad():
            adapter.lora_B.normal_()
    model.set_block_mask("0.neurons", (torch.arange(24) % 3 != 0).float())
    ids = torch.randint(50, (3, 7))
    attention = torch.ones_like(ids)
    with torch.no_grad():
        program = torch.export.export(model.model, (ids, attention))
        got, want = reloaded(program)(ids, attention), model(ids, attention)
    torch.testing.assert_close(got.logits, want.logits)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # inductor's own
@pytest.mark.slow
def test_inductor_ahead_of_time(tmp_path):
    adapter = make(dtype=torch.float32).eval()
    adapter.set_masks(*masks())
    x = torch.randn(4, 10)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(torch.export.export(adapter, (x,)), package_path=str(tmp_path / "adapter.pt2"))
        module = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(module(x), adapter(x))
