"""A plain training loop with accelerate: on one device, or by `accelerate launch examples/accelerate_loop.py` on several.

    python examples/accelerate_loop.py [--quick]

Several processes need APTConfig(max_rank=...), which reserves the room that ranks grow into; one process can leave it out.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import apt_ext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="few steps, to see it run")
parser.add_argument("--output", default="smaller-model")
options = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
config = BertConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = BertForSequenceClassification(config)  # yours: AutoModelForSequenceClassification.from_pretrained(...)
rows = [{"input_ids": torch.randint(0, 100, (16,)), "labels": torch.tensor(i % 2)} for i in range(128 if options.quick else 4096)]

model = apt_ext.get_apt_model(base, apt_ext.APTConfig(r=4, max_rank=16, prune=["neurons"], density=0.6))
optimizer = torch.optim.AdamW(apt_ext.adapter_parameters(model), lr=5e-4)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=8, shuffle=True))
steps = 2 * len(loader)
schedule = accelerator.prepare(get_linear_schedule_with_warmup(optimizer, steps // 10, steps))
controller = apt_ext.Controller(prepared, optimizer, total_steps=steps, shrink="compact", log=accelerator.print)

prepared.train()
for _ in range(2):
    for batch in loader:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        controller.observe()  # after the backward, before the step
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        controller.step()  # after the step

if accelerator.is_main_process:
    apt_ext.export(model, options.output)
accelerator.print(f"loss {loss.item():.3f}, density {model.density:.2f}, written to {options.output}")
