"""The same as a callback of Lightning. Needs `python -m pip install lightning`.

python examples/lightning_callback.py [--quick]
"""

import argparse

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import apt_ext


class Pruning(lightning.Callback):
    """Run a Controller. The module has the APTModel as `model` and one optimizer.

    Lightning calls back where a Controller wants to be called: before the optimizer's step, and after each batch.
    """

    def __init__(self, **arguments):
        self.arguments = arguments
        self.controller = None

    def on_train_start(self, trainer, module):
        steps = int(trainer.estimated_stepping_batches)
        self.controller = apt_ext.Controller(module.model, trainer.optimizers, total_steps=steps, **self.arguments)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.controller.observe()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > self.controller.now:  # not between micro-batches
            self.controller.step()
            module.log("density", self.controller.density)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["apt_controller"] = self.controller.state_dict()


class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(apt_ext.adapter_parameters(self.model), lr=5e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, to see it run")
    parser.add_argument("--output", default="smaller-model")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    base = BertForSequenceClassification(config)  # yours: AutoModelForSequenceClassification.from_pretrained(...)
    rows = [{"input_ids": torch.randint(0, 100, (16,)), "labels": torch.tensor(i % 2)} for i in range(128 if options.quick else 4096)]

    model = apt_ext.get_apt_model(base, apt_ext.APTConfig(r=4, prune=["neurons"], density=0.6))
    pruning = Pruning(log=print)
    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[pruning],
        accelerator="cpu" if options.quick else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not options.quick,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(model), DataLoader(rows, batch_size=8, shuffle=True))
    apt_ext.export(model, options.output)
    print(f"density {model.density:.2f}, written to {options.output}")


if __name__ == "__main__":
    main()
