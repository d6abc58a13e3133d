"""Prune a classifier on your own csv with transformers' Trainer.

python examples/trainer_csv.py --data my.csv --text-column text --label-column label --model google-bert/bert-base-uncased
python examples/trainer_csv.py --quick      a tiny random model on a small csv that the script writes
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, DataCollatorWithPadding, Trainer, TrainingArguments

import apt_ext
from apt_ext.hf import APTCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a tiny random model and a small csv, to see it run")
parser.add_argument("--data", help="a csv with a header")
parser.add_argument("--text-column", default="text")
parser.add_argument("--label-column", default="label")
parser.add_argument("--model", help="a directory, or a model of the Hub as owner/name; `apt-ext train` takes installed packages too")
parser.add_argument("--density", type=float, default=0.6)
parser.add_argument("--epochs", type=float)
parser.add_argument("--output", default="smaller-model")
options = parser.parse_args()
if not options.quick and not (options.data and options.model):
    parser.error("give --data and --model, or --quick")
if Path(options.output).exists():
    parser.error(f"--output: expected a new directory, got {options.output}, which exists")


def write_reviews(path):
    """A csv of two kinds of sentences."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        words = {"good": ("great", "fine", "bright"), "bad": ("dull", "poor", "slow")}
        for i in range(120):
            label = ("bad", "good")[i % 2]
            writer.writerow([f"a {words[label][i // 2 % 3]} film", label])


def tiny_tokenizer(texts):
    """A tokenizer of the words of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


if options.quick and not options.data:
    options.data = "reviews.csv"
    write_reviews(options.data)
with open(options.data, newline="", encoding="utf-8") as file:
    table = list(csv.DictReader(file))
texts = [row[options.text_column] for row in table]
labels = sorted({row[options.label_column] for row in table})
ids = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}, "num_labels": len(labels)}

torch.manual_seed(0)
if options.quick:
    tokenizer = tiny_tokenizer(texts)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=len(tokenizer), **sizes, **ids))
else:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, ignore_mismatched_sizes=True, **ids)

rows = [
    {**tokenizer(text, truncation=True, max_length=128), "labels": ids["label2id"][row[options.label_column]]}
    for text, row in zip(texts, table, strict=True)
]
order = torch.randperm(len(rows)).tolist()
held_out, kept = ([rows[i] for i in part] for part in (order[: len(rows) // 10], order[len(rows) // 10 :]))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


model = apt_ext.get_apt_model(base, apt_ext.APTConfig(r=8))
arguments = TrainingArguments(
    "run",
    num_train_epochs=options.epochs or (8 if options.quick else 3),
    per_device_train_batch_size=8,
    learning_rate=5e-3 if options.quick else 5e-4,
    report_to=[],
    save_strategy="no",
    disable_tqdm=options.quick,
    use_cpu=options.quick,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=kept,
    eval_dataset=held_out,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
    callbacks=[APTCallback(density=options.density, prune=["neurons"])],
)
trainer.train()
print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f} with {model.density:.2f} of the layers' weights")
apt_ext.export(model, options.output)
tokenizer.save_pretrained(options.output)
print(f"written to {options.output}: {', '.join(sorted(path.name for path in Path(options.output).iterdir()))}")
