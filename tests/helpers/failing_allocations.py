"""Run by test_out_of_memory.py under a shim whose n-th allocation fails: each scenario for n = 1, 2, 3 ... until it succeeds.

Prints one line of JSON: for each scenario the number of allocations that it makes, or what had changed. With --sparse the steps grow by an
eighth.
"""

import ctypes
import json
import sys
import warnings

import torch
from torch import nn

from apt_ext import APTAdapter, APTConfig, adapters, get_apt_model, ops, shrink

shim = ctypes.CDLL(None)
BIG = 700  # above one block of rows in merge_


def adapter(dtype=torch.float32, rank=3, wide=10, **options):
    torch.manual_seed(0)
    made = APTAdapter.from_linear(nn.Linear(wide, 7, dtype=dtype), rank, **options)
    with torch.no_grad():
        made.Wb.normal_()
    made.set_masks(torch.rand(wide), torch.rand(7))
    return made


def trained(**options):
    made = adapter(**options)
    optimizer = torch.optim.AdamW([made.lora_A, made.lora_B], amsgrad=True)
    made(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()
    return made, optimizer


def model():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=8
    )
    made = get_apt_model(
        transformers.BertForSequenceClassification(config),
        APTConfig(r=2, lora_alpha=4, target_modules=["query", "value", "intermediate.dense", "output.dense"]),
    )
    for _, one in adapters(made):
        with torch.no_grad():
            one.lora_B.normal_()
    made.set_block_mask("0.neurons", (torch.arange(12) % 3 != 0).float())
    return made


def merged(keep="device", **options):
    made = adapter(**options).eval()
    made.merge_weights(keep)
    return made


def pruned(dense=None):
    made = adapter()
    made.set_masks((torch.arange(10) % 3 != 0).float(), (torch.arange(7) % 3 != 0).float())
    if dense is not None:
        made.compact(dense=dense)
    return made


def compact_model():
    made = model()
    made.compact(chain=True)
    return made


def strided_grads():
    torch.manual_seed(0)
    return [torch.randn(6, 4).t(), torch.randn(4, 6), torch.randn(3, 6, dtype=torch.bfloat16).t()], [
        torch.rand(4),
        torch.rand(6),
        torch.rand(3),
    ]


def plain(n, k, r, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n, k, dtype=dtype), torch.randn(r, k), torch.randn(n, r)


def transposed():
    W, A, B = plain(12, 9, 2, torch.bfloat16)
    return W.t().contiguous().t(), A, B


def load(a, state):
    a.load_state_dict(state)


# name: (make the things, change them); the second is called with what the first returned
SCENARIOS = {
    "merge_": (lambda: plain(BIG, BIG, 4), lambda W, A, B: ops.merge_(W, A, B, 1.0, torch.ones(BIG))),
    "merge_ transposed": (transposed, lambda W, A, B: ops.merge_(W, A, B, 1.0)),
    "merge_ unchecked": (lambda: plain(9, 12, 2), lambda W, A, B: ops.merge_(W, A, B, 1.0, None, None, False)),
    "mask_grads_": (strided_grads, lambda grads, masks: ops.mask_grads_(grads, masks, [0, 1, 1])),
    "set_masks": (lambda: [adapter()], lambda a: a.set_masks(torch.rand(10), torch.rand(7).double())),
    "merge on the device": (lambda: [adapter()], lambda a: a.merge_weights()),
    "merge to the cpu": (lambda: [adapter(torch.float16)], lambda a: a.merge_weights("cpu")),
    "unmerge": (lambda: [merged()], lambda a: a.unmerge_weights()),
    "growth": (trained, lambda a, optimizer: a.increase_rank(5, optimizer=optimizer)),
    "growth within max_rank": (lambda: trained(max_rank=6), lambda a, optimizer: a.increase_rank(5, optimizer=optimizer)),
    "apply_grad_mask": (trained, lambda a, _: a.apply_grad_mask()),
    "load another rank": (lambda: (adapter(), adapter(rank=5).state_dict()), load),
    "load within max_rank": (lambda: (adapter(max_rank=6), adapter(rank=5).state_dict()), load),
    "load into a merged one": (lambda: (merged(), adapter(rank=5).state_dict()), load),
    "load a merged one": (lambda: (adapter(), merged(rank=5).state_dict()), load),
    "load a merged one into a merged one": (lambda: (merged("cpu"), merged(rank=5).state_dict()), load),
    "load into a compact one": (lambda: (pruned(dense="keep"), adapter(rank=5).state_dict()), load),
    "load a merged one into a compact one": (lambda: (pruned(dense="keep"), merged(rank=5).state_dict()), load),
    "compact": (lambda: [adapter()], lambda a: a.compact()),
    "compact to the cpu": (lambda: [adapter()], lambda a: a.compact(dense="cpu")),
    "from the cpu to the device": (lambda: [pruned(dense="cpu")], lambda a: a.compact(dense="keep")),
    "compact no more": (lambda: [pruned(dense="cpu")], lambda a: a.compact(False)),
    "masks of a compact one": (lambda: [pruned(dense="keep")], lambda a: a.set_masks((torch.arange(10) % 2).float())),
    "masks that keep more of a compact one": (lambda: [pruned(dense="keep")], lambda a: a.set_masks(torch.ones(10), torch.ones(7))),
    "masks that keep less of a compact one": (lambda: [pruned(dense="keep")], lambda a: a.set_masks((torch.arange(10) < 3).float())),
    "masks that keep more of an offloaded one": (lambda: [pruned(dense="cpu")], lambda a: a.set_masks(torch.ones(10), torch.ones(7))),
    "masks of an offloaded one": (lambda: [pruned(dense="cpu")], lambda a: a.set_masks((torch.arange(10) % 3 == 1).float())),
    "compact a model": (lambda: [model()], lambda m: m.compact(chain=True)),
    "put a compact model on the cpu": (lambda: [compact_model()], lambda m: m.compact(dense="cpu")),
    "set_block_mask": (lambda: [model()], lambda m: m.set_block_mask("0.neurons", (torch.arange(12) % 2).float())),
    "set_block_mask of a compact model": (lambda: [compact_model()], lambda m: m.set_block_mask("0.neurons", torch.ones(12))),
    "set_block_mask of the stream": (lambda: [model()], lambda m: m.set_block_mask("hidden", (torch.arange(8) % 4 != 0).float())),
    "cut": (lambda: [model()], lambda m: m.cut()),
    "shrink": (lambda: [model()], lambda m: shrink(m)),
    "merge_and_unload": (lambda: [model()], lambda m: m.merge_and_unload()),
}


def bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def computed(thing):
    """Outputs of an adapter that computes on kept lanes: its operands must fit each other."""
    compacted = [module for module in thing.modules() if isinstance(module, APTAdapter) and module.compacted]
    with torch.no_grad():
        return [snapshot(module(torch.linspace(-1, 1, module.in_features).to(module.lora_A.dtype))) for module in compacted]


def snapshot(thing):
    """All that a user could see of a module, an optimizer, a tensor, a list or a dict of those."""
    if isinstance(thing, torch.Tensor):
        return bits(thing), None if thing.grad is None else bits(thing.grad)
    if isinstance(thing, torch.optim.Optimizer):
        return [snapshot(list(state.values())) for state in thing.state.values()]
    if isinstance(thing, nn.Module):
        tensors = {name: snapshot(t) for name, t in [*thing.named_parameters(), *thing.named_buffers()]}
        plain = {
            name: [snapshot(value) for value in (m.rank, m.merge.originals, m.merged, m.disabled, m.compacted, m.packing.store.place)]
            for name, m in thing.named_modules()
            if isinstance(m, APTAdapter)
        }
        whole = {name: snapshot(m.packing.store.host) for name, m in thing.named_modules() if isinstance(m, APTAdapter)}
        return tensors, plain, whole, computed(thing), {name: type(module).__name__ for name, module in thing.named_modules()}
    if isinstance(thing, list | tuple):
        return [snapshot(one) for one in thing]
    if isinstance(thing, dict):
        return {name: snapshot(value) for name, value in thing.items()}
    return repr(thing)


def run(make, change, sparse):
    """The number of allocations that were failed in turn, or a text that says what was wrong."""
    change(*make())  # what torch caches at a first call is allocated
    n = 1
    while n < 3000:
        things = make()
        before = snapshot(things)
        message = ""
        shim.fail_allocation(ctypes.c_long(n))
        try:
            change(*things)
        except (RuntimeError, MemoryError) as error:
            message = str(error)
        finally:
            left = shim.allocations_left()
            shim.fail_allocation(ctypes.c_long(0))
        if left > 0:
            return f"raised without a failed allocation: {message}" if message else n - left
        if message:  # else torch could do without
            if snapshot(things) != before:
                return f"changed by failing allocation {n}: {message.splitlines()[0]}"
            change(*things)  # and the next call works
        n += 1 + (n // 8 if sparse else 0)
    return "never succeeded"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shim.allocations_left.restype = ctypes.c_long
    print(json.dumps({name: run(*SCENARIOS[name], "--sparse" in sys.argv) for name in sys.argv[1:] if name != "--sparse"}))
