"""Go on from a LoRA that PEFT trained: prune, and hand back a LoRA on a smaller base. Needs `python -m pip install peft`.

python examples/from_peft.py --model NAME_OR_DIRECTORY --adapter DIRECTORY
python examples/from_peft.py --quick      a tiny random model and a LoRA that the script makes
"""

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import apt_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a tiny random model, to see it run")
parser.add_argument("--model", help="a directory or a name that transformers loads")
parser.add_argument("--adapter", default="lora", help="the directory of a trained LoRA")
parser.add_argument("--density", type=float, default=0.8)
parser.add_argument("--output", default="smaller")
options = parser.parse_args()
if not options.quick and not options.model:
    parser.error("give --model, or --quick")


def base_model():
    if not options.quick:
        return AutoModelForCausalLM.from_pretrained(options.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=1, eos_token_id=None, **sizes))


if options.quick:
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base_model(), lora).save_pretrained(options.adapter)

lora = peft.PeftConfig.from_pretrained(options.adapter)
config = apt_ext.APTConfig.from_peft(lora, prune=["neurons"], density=options.density)
model = apt_ext.APTModel.from_peft(base_model(), options.adapter, config)

steps = 30 if options.quick else 500
optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=1e-3)
controller = apt_ext.Controller(model, optimizer, total_steps=steps, export="stock", log=print)
model.train()
for _ in range(steps):
    tokens = torch.randint(2, model.config.vocab_size, (4, 16))  # yours: batches of your data
    model(input_ids=tokens, labels=tokens).loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()

apt_ext.to_peft(model, options.output)
small = AutoModelForCausalLM.from_pretrained(f"{options.output}/base")
again = peft.PeftModel.from_pretrained(small, f"{options.output}/adapter").eval()
torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits, rtol=1e-3, atol=1e-3)
print(f"density {model.density:.2f}; {options.output}/base and {options.output}/adapter give the same logits")
