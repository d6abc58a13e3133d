"""Liger's patches of transformers' LLaMA, for the length of a test."""

NAMES = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")


def keep_llama(monkeypatch):
    """What Liger replaces is as before when the test ends: names in transformers' module, and a method."""
    from transformers.models.llama import modeling_llama

    for name in NAMES:
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    stock = modeling_llama.LlamaForCausalLM
    monkeypatch.setattr(stock, "forward", stock.forward)
    return modeling_llama
