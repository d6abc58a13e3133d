"""Prune heads and neurons of a language model, export it, and generate with what stock transformers loads.

python examples/decoder_generation.py --model NAME_OR_DIRECTORY --text my.txt
python examples/decoder_generation.py --quick      a tiny random LLaMA that learns to count
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import apt_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a tiny random model, to see it run")
parser.add_argument("--model", help="a directory or a name that transformers loads")
parser.add_argument("--text", help="a text file to train on")
parser.add_argument("--density", type=float, default=0.7)
parser.add_argument("--steps", type=int)
parser.add_argument("--output", default="smaller-llm")
options = parser.parse_args()
if not options.quick and not (options.model and options.text):
    parser.error("give --model and --text, or --quick")
if Path(options.output).exists():
    parser.error(f"--output: expected a new directory, got {options.output}, which exists")

torch.manual_seed(0)
if options.quick:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, **sizes))
    tokens, length, rate = torch.arange(4096) % 60 + 3, 32, 5e-3
else:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokens, length, rate = tokenizer(Path(options.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0], 512, 5e-4
steps = options.steps or (60 if options.quick else 1000)
device = torch.device("cuda" if torch.cuda.is_available() and not options.quick else "cpu")

model = apt_ext.get_apt_model(
    base.to(device), apt_ext.APTConfig(r=8, float32_factors=True, prune=["heads", "neurons"], density=options.density)
)
optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=rate)
controller = apt_ext.Controller(model, optimizer, total_steps=steps, export="stock", log=print)
model.train()
for _ in range(steps):
    starts = torch.randint(0, len(tokens) - length, (8,)).tolist()
    batch = torch.stack([tokens[start : start + length] for start in starts]).to(device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    controller.observe()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()
print(f"loss {loss.item():.3f}, density {model.density:.2f}")

apt_ext.export(model, options.output)
small = AutoModelForCausalLM.from_pretrained(options.output).to(device).eval()
prompt = tokens[:8].unsqueeze(0).to(device)
written = small.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0]
if options.quick:
    print("generated", written.tolist())
else:
    tokenizer.save_pretrained(options.output)
    print(tokenizer.decode(written))
