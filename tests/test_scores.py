"""The salience of a model's blocks against a plain computation that keeps every activation and its gradient."""

import pytest
import torch
from families import FAMILIES, adapted, mask_all, some
from test_oneshot import with_loss

from apt_ext.method import block_scores

BERT = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
# {family: [(beginning of the blocks' names, a layer, {end of a block's name: (what reads the stream before it, what reads it)})]}
READERS = {
    name: [("", layer, {"heads": linears[:2], "neurons": linears[2:]})]
    for name, layer, linears in (
        ("bert", "bert.encoder.layer.{}", BERT),
        ("llama", "model.layers.{}", LLAMA),
        ("gpt2", "transformer.h.{}", GPT2),
    )
}
READERS["t5-gated"] = [
    (
        f"{stack}.",
        f"{stack}.block.{{}}.layer",
        {
            "heads": ("0.SelfAttention.q", "0.SelfAttention.o"),
            **({"cross_heads": ("1.EncDecAttention.q", "1.EncDecAttention.o")} if last == 2 else {}),
            "neurons": (f"{last}.DenseReluDense.wi_0", f"{last}.DenseReluDense.wo"),
        },
    )
    for stack, last in (("encoder", 1), ("decoder", 2))
]


def plain(name, apt, batch):
    """{block: the sum over its channels of (sum of abs(H)) x (sum of abs(dL/dH))}, without padding; "hidden" is summed over all sites."""
    sites = [
        (f"{prefix}{i}.{end}", *(apt.model.get_submodule(f"{layer.format(i)}.{linear}") for linear in linears))
        for prefix, layer, rules in READERS[name]
        for i in range(2)
        for end, linears in rules.items()
    ]
    seen, handles = {}, []
    for block, before, reader in sites:
        for key, module in ((block, reader), (f"hidden {block}", before)):

            def keep(module, args, key=key):
                seen[key] = args[0]
                if args[0].requires_grad:  # the stream before the first adapter does not
                    args[0].retain_grad()

            handles.append(module.register_forward_pre_hook(keep))
    apt(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    apt.zero_grad()

    def products(key):
        h = seen[key].detach()
        if seen[key].grad is None:
            return torch.zeros(h.shape[-1], dtype=h.dtype)
        everywhere = torch.ones(h.shape[:2], dtype=torch.bool)
        real = everywhere if "decoder." in key else batch["attention_mask"].bool()
        return h[real].abs().sum(0) * seen[key].grad[real].abs().sum(0)

    found = {block: products(block).view(apt.blocks[block].count, -1).sum(1) for block, _, _ in sites}
    found["hidden"] = sum(products(f"hidden {block}") for block, _, _ in sites)
    if FAMILIES[name].alike:
        stacks = {block: (block.split(".")[0], block.rpartition(".")[2]) for block in found if block.endswith("heads")}
        found |= {block: sum(found[other] for other in stacks if stacks[other] == stack) for block, stack in stacks.items()}
    return found


@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.parametrize("name", READERS)
def test_scores_are_those_of_a_plain_computation(name, masks):
    """Added up over batches; a head's is that of its channels, a KV head's that of the query heads that share it."""
    family = FAMILIES[name]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), masks))
    batches = list(with_loss(family, apt))
    expected = [plain(name, apt, batch) for batch in batches]
    found = block_scores(apt, ["heads", "neurons", "hidden"], batches)
    assert found.keys() == apt.blocks.keys() == expected[0].keys()
    for block, score in found.items():
        wanted = sum(one[block] for one in expected)
        torch.testing.assert_close(score.double(), wanted, rtol=1e-5, atol=0)
        assert bool(wanted.any()) and torch.equal(wanted == 0, score == 0)
