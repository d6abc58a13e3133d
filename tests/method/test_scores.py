"""The salience of a model's blocks against a plain computation that keeps every activation and its gradient."""

import pytest
import torch
from families import FAMILIES, adapted, mask_all, some, with_loss

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


def sites_of(name, apt):
    """[(block, what reads the stream before it, what reads it)]"""
    return [
        (f"{prefix}{i}.{end}", *(apt.model.get_submodule(f"{layer.format(i)}.{linear}") for linear in linears))
        for prefix, layer, rules in READERS[name]
        for i in range(2)
        for end, linears in rules.items()
    ]


def plain(name, apt, batch):
    """{block: (sum of abs(H)) x (sum of abs(dL/dH)) of its channels}, {block: sum of H}; "hidden block" is of the stream before the block.

    Padding left out.
    """
    seen, handles = {}, []
    for block, before, reader in sites_of(name, apt):
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
    products, signed = {}, {}
    for key, h in seen.items():
        everywhere = torch.ones(h.shape[:2], dtype=torch.bool)
        real = everywhere if "decoder." in key else batch["attention_mask"].bool()
        grad = torch.zeros_like(h) if h.grad is None else h.grad
        products[key], signed[key] = h.detach()[real].abs().sum(0) * grad[real].abs().sum(0), h.detach()[real].sum(0)
    return products, signed


def of_blocks(name, apt, products):
    """{block: the sum of its channels', of "hidden" of all sites'}"""
    sites = sites_of(name, apt)
    found = {block: products[block].view(apt.blocks[block].count, -1).sum(1) for block, _, _ in sites}
    return {**found, "hidden": sum(products[f"hidden {block}"] for block, _, _ in sites)}


def of_outliers(name, apt, mean):
    """{block: the square root of the excess kurtosis of its part of W_eff * mean, of "hidden" of the rows, summed over all sites}"""

    def root(values):
        centred = values - values.mean(-1, keepdim=True)
        second = centred.square().mean(-1)
        excess = torch.where(second > 1e-25, centred.pow(4).mean(-1) / second.square().clamp_min(1e-300) - 3, 0.0)
        return excess.clamp_min(0).sqrt()

    found, rows = {}, 0.0
    for block, _, reader in sites_of(name, apt):
        parts = (reader.matrix + reader.scaling * reader.Wb @ reader.Wa).detach() * mean[block]
        found[block] = root(parts.t().reshape(apt.blocks[block].count, -1))
        rows = rows + root(parts[:, reader.mask_in != 0])  # what is masked counts as little as what is cut
    return {**found, "hidden": rows}


@pytest.mark.parametrize("kurtosis", [0.0, 0.7])
@pytest.mark.parametrize("masks", ["none", "soft"])
@pytest.mark.parametrize("name", READERS)
def test_scores_are_those_of_a_plain_computation(name, masks, kurtosis):
    """Added up over batches; a head's is that of its channels, a KV head's that of the query heads that share it; outliers on top."""
    family = FAMILIES[name]
    apt = adapted(family)
    mask_all(apt, some(family, apt.blocks, ("heads", "neurons"), masks))
    batches = list(with_loss(family, apt))
    sums = [plain(name, apt, batch) for batch in batches]
    expected = of_blocks(name, apt, {key: sum(products[key] for products, _ in sums) for key in sums[0][0]})
    on_top = of_outliers(name, apt, {key: sum(signed[key] for _, signed in sums) for key in sums[0][1]})
    for kind in ("heads", "neurons", "hidden"):
        own = [block for block in expected if apt.blocks[block].kind == kind]
        mean = torch.cat([expected[block][apt.get_block_mask(block) != 0] for block in own]).mean()
        expected |= {block: expected[block] + kurtosis * mean * on_top[block] for block in own}
    if family.alike:
        stacks = {block: (block.split(".")[0], block.rpartition(".")[2]) for block in expected if block.endswith("heads")}
        expected |= {block: sum(expected[other] for other in stacks if stacks[other] == stack) for block, stack in stacks.items()}

    found = block_scores(apt, ["heads", "neurons", "hidden"], batches, kurtosis)
    assert found.keys() == apt.blocks.keys() == expected.keys() and any(bool(more.any()) for more in on_top.values())
    for block, score in found.items():
        torch.testing.assert_close(score.double(), expected[block], rtol=1e-5, atol=0)
        assert bool(score.any()) and torch.equal(expected[block] == 0, score == 0)
