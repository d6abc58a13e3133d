"""What counts as trainable: frozen factors and reserved rows do not, before and after growth and a cut."""

import pytest
import torch
from families import FAMILIES, keep_first

from apt_ext import APTAdapter, APTConfig, Controller, adapter_parameters, adapters, get_apt_model

pytest.importorskip("transformers")


@pytest.mark.parametrize("max_rank", [None, 5])
def test_an_adapter_counts_what_trains(max_rank):
    adapter = APTAdapter(6, 10, rank=3, max_rank=max_rank)
    assert adapter.get_parameter_count() == adapter.get_sparsity_stats()["total_params"] == 3 * 16
    adapter.lora_A.requires_grad_(False)
    assert adapter.get_parameter_count() == adapter.get_sparsity_stats()["total_params"] == 3 * 10
    adapter.requires_grad_(False)
    assert adapter.get_parameter_count() == 0
    adapter.lora_A.requires_grad_(True)
    adapter.increase_rank(4)
    assert adapter.get_parameter_count() == 4 * 6


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("max_rank", [None, 4])
def test_a_model_counts_what_an_optimizer_gets(name, max_rank, capsys):
    family = FAMILIES[name]
    stock = sum(parameter.numel() for parameter in family.model().parameters())
    apt = get_apt_model(family.model(), APTConfig(r=2, max_rank=max_rank))
    found = [adapter for _, adapter in adapters(apt) if adapter.rank]
    factors = sum(2 * (adapter.in_features + adapter.out_features) for adapter in found)
    head = sum(p.numel() for saved in apt.saved for p in apt.get_submodule(f"model.{saved}").parameters())
    assert apt.get_nb_trainable_parameters() == (factors + head, stock + factors)
    assert apt.get_nb_trainable_parameters()[0] == head + sum(adapter.get_parameter_count() for adapter in found)
    for adapter in found[::2]:
        adapter.lora_A.requires_grad_(False)
    frozen = sum(2 * adapter.in_features for adapter in found[::2])
    assert apt.get_nb_trainable_parameters() == (factors + head - frozen, stock + factors)
    if max_rank is None:
        assert apt.get_nb_trainable_parameters()[0] == sum(p.numel() for p in adapter_parameters(apt))
    apt.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {factors + head - frozen:,d} || all params: {stock + factors:,d}")
    keep_first(apt, neurons=8).cut()
    assert apt.get_nb_trainable_parameters()[0] == head + sum(adapter.get_parameter_count() for adapter in found)


def test_a_controller_budgets_ranks_and_resumes_with_frozen_factors():
    """What was frozen before it was made is part of the ranks that it divides, and of its state."""
    apts = [get_apt_model(FAMILIES["bert"].model(torch.float32), APTConfig(r=2)) for _ in range(2)]
    for apt in apts:
        for _, adapter in list(adapters(apt))[:3]:
            adapter.requires_grad_(False)
    controllers = [Controller(apt, torch.optim.AdamW(adapter_parameters(apt)), 16, density=0.5) for apt in apts]
    held = sum(a.rank * (a.in_features + a.out_features) for _, a in adapters(apts[0]))
    assert controllers[0].adapter_parameters == held > sum(a.get_parameter_count() for _, a in adapters(apts[0]))
    controllers[1].load_state_dict(controllers[0].state_dict())
