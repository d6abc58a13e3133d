"""List what is trained: the method, its variants, and what it is compared with.

Every row has the same number of optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .tasks import TASKS, Task


@dataclass(frozen=True)
class Row:
    """Describe one way to train.

    title     for the tables
    whole     every weight trains, there are no adapters
    once      what decides where pruning is one step: "salience" (summed over a few hundred samples),
              "magnitude" (of the weights) or "random"; the pruned part is cut, and training goes on with a new
              optimizer and schedule
    at        the share of the steps before that step
    gradual   a Controller prunes
    growth    adapter parameters at the end over those at the start
    teacher   None, "self" (the student when pruning starts) or "lora" (a finished dense LoRA of the same seed,
              trained besides)
    kurtosis  the weight of outliers
    shrink    how the Controller makes steps cheaper; None: its default
    extra     not among the rows that "all" means
    """

    title: str
    whole: bool = False
    once: str | None = None
    at: float = 0.0
    gradual: bool = False
    growth: float = 1.0
    teacher: str | None = None
    kurtosis: float = 0.0
    shrink: str | None = None
    extra: bool = False

    @property
    def pruned(self) -> bool:
        return self.gradual or self.once is not None

    @property
    def controlled(self) -> bool:
        """Whether a Controller is at work: the package's own way to train, whose steps on a GPU are CUDA graphs."""
        return self.gradual or self.growth > 1

    def rates(self, task: Task) -> tuple[float, ...]:
        """Return the peak learning rates among which validation chooses."""
        return task.whole if self.whole else task.rates


_apt = partial(Row, gradual=True, growth=4.0)
_ENCODER_ROWS = {
    "full": Row("full fine-tuning", whole=True),
    "lora": Row("dense LoRA"),
    "oneshot": Row("LoRA, one-shot prune, recovery", once="salience", at=0.5),
    "magnitude": Row("LoRA, magnitude prune, recovery", once="magnitude", at=0.5),
    "random": Row("LoRA, random prune, recovery", once="random", at=0.5),
    "apt": _apt("APT"),
    "apt-start": Row("APT, pruned at the start only", once="salience", growth=4.0),
    "apt-nogrowth": Row("APT without growth", gradual=True),
    "apt-self": _apt("APT, self-distilled", teacher="self"),
    "apt-lora": _apt("APT with a LoRA teacher", teacher="lora"),
    "apt-wide": _apt("APT, full-size until the end", shrink="none", extra=True),
}
_DECODER_ROWS = {
    "lora": Row("dense LoRA"),
    "oneshot": Row("one-shot prune, then LoRA", once="salience"),
    "oneshot-kurtosis": Row("one-shot prune with kurtosis, then LoRA", once="salience", kurtosis=1.0),
    "apt": _apt("APT"),
    "apt-kurtosis": _apt("APT with kurtosis", kurtosis=1.0),
    "apt-wide": _apt("APT, full-size until the end", shrink="none", extra=True),
}


def rows_of(task: Task) -> dict[str, Row]:
    """Return the task's rows, in the order of the tables."""
    return _ENCODER_ROWS if task.classes else _DECODER_ROWS


def row_names() -> list[str]:
    """Return the names of the rows of all tasks, each once."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in rows_of(task)))
