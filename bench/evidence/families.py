"""Families of fine-tunes of one start, made on the spot, and what scores a merge of them."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from examples.adapters import encoder, language_model, texts
from examples.quickstart import evaluate as quickstart_scores
from examples.quickstart import train as quickstart
from examples.quickstart.data import Split, Task, load_tasks

BASE = "base"
VALIDATION, TEST = "validation", "test"
Scores = Mapping[str, float]
State = dict[str, Tensor]
# Enough steps to guess some bytes of each style.
QUICK_BYTES = language_model.Schedule(pretrain_steps=60, finetune_steps=20, test=0)


class Family(Protocol):
    """Fine-tunes of one start; those of `adapters` are PEFT folders."""

    adapters: bool

    @property
    def own(self) -> Mapping[str, str]:
        """By task the member that was trained for it."""

    @property
    def members(self) -> Sequence[str]:
        """What is merged, one folder each."""

    def make(self, home: Path, seed: int, quick: bool) -> None:
        """Write `home`/base and a folder for each member."""

    def load(self, folder: Path) -> Any:
        """Return a model from the folder of one."""

    def scores(self, model: Any, home: Path, split: str) -> Scores:
        """Return the accuracy in each task."""


@dataclass(frozen=True)
class Images:
    """Small ViTs with one classifier for all tasks, which fine-tuning leaves as it was."""

    tasks: Callable[[int], Sequence[Task]]
    steps: int | None = None  # of each; None: those of the quickstart
    adapters = False

    @property
    def own(self) -> Mapping[str, str]:
        return {task.name: task.name for task in _tasks(self.tasks, 0)}

    @property
    def members(self) -> Sequence[str]:
        return tuple(self.own)

    def make(self, home: Path, seed: int, quick: bool) -> None:
        start, schedule = _pretrained(home, seed, quick)
        for number, task in enumerate(self.tasks(seed), start=1):
            steps = schedule.finetune_steps if self.steps is None else {task.name: self.steps}
            how = quickstart.Schedule(0, steps if not quick else {task.name: 4})
            quickstart.finetune(start, task, how, seed + number).save_pretrained(home / task.name)

    def load(self, folder: Path) -> Any:
        return quickstart_scores.load(folder)

    def scores(self, model: Any, home: Path, split: str) -> Scores:
        return quickstart_scores.accuracies(model, _tasks(self.tasks, _seed(home)), split)


@dataclass(frozen=True)
class Snapshots:
    """Snapshots of one run at a constant rate: one task, of which the last is the user's model."""

    count: int = 5
    steps: int = 160
    every: int = 20
    rate: float = 1e-3
    adapters = False

    @property
    def own(self) -> Mapping[str, str]:
        return {"digit": self.members[-1]}

    @property
    def members(self) -> Sequence[str]:
        return tuple(f"step{self.steps - self.every * k}" for k in reversed(range(self.count)))

    def make(self, home: Path, seed: int, quick: bool) -> None:
        model, _ = _pretrained(home, seed, quick)
        data = _digits(seed).splits["train"]
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.01)
        model.train()
        for step in range(1, self.steps + 1):
            rows = torch.randint(len(data), (quickstart.BATCH,), generator=generator)
            model(pixel_values=data.images[rows], labels=data.labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if f"step{step}" in self.members:
                model.save_pretrained(home / f"step{step}")

    def load(self, folder: Path) -> Any:
        return quickstart_scores.load(folder)

    def scores(self, model: Any, home: Path, split: str) -> Scores:
        return quickstart_scores.accuracies(model, [_tasks(_only_digits, _seed(home))[0]], split)


@dataclass(frozen=True)
class Texts:
    """MiniLM on three tasks of text classification: all of it ("full"), "lora" or "ia3"."""

    kind: str
    full_steps: int = 60
    full_rate: float = 3e-4

    @property
    def adapters(self) -> bool:
        return self.kind != "full"

    @property
    def own(self) -> Mapping[str, str]:
        return {task: task for task in texts.TASKS}

    @property
    def members(self) -> Sequence[str]:
        return texts.TASKS

    def make(self, home: Path, seed: int, quick: bool) -> None:
        size = texts.Size(20, 48, 12, 12) if quick else texts.Size(120, 900, 90, 150)
        texts.write_tasks(home / "texts.json", size, seed)
        tasks, embed, prototypes = _encoder(home)
        encoder.load_base().save_pretrained(home / BASE)
        rates = {"full": self.full_rate, "lora": encoder.FULL.lora_lr, "ia3": encoder.FULL.ia3_lr}
        steps = 2 if quick else {"full": self.full_steps}.get(self.kind, encoder.FULL.steps)
        for number, task in enumerate(texts.TASKS, start=1):
            if self.adapters:
                model = encoder.new_adapter(self.kind, seed + number)
            else:
                model = encoder.load_base()
            rate, examples = rates[self.kind], tasks[task]["train"]
            encoder.train(model, embed, prototypes[task], examples, steps, rate, seed + number)
            model.save_pretrained(home / task)

    def load(self, folder: Path) -> Any:
        return transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def scores(self, model: Any, home: Path, split: str) -> Scores:
        tasks, embed, prototypes = _encoder(home)
        found = {}
        for task, rows in tasks.items():
            in_order = sorted(rows[split], key=lambda row: len(row[0]))  # little padding
            found[task] = encoder.accuracy(model, embed, prototypes[task], in_order)
        return found


@dataclass(frozen=True)
class Bytes:
    """A causal language model of bytes on four kinds of text; scored by the next byte."""

    adapters: bool
    windows: int = 64

    @property
    def own(self) -> Mapping[str, str]:
        return {style: style for style in language_model.STYLES}

    @property
    def members(self) -> Sequence[str]:
        return language_model.STYLES

    def make(self, home: Path, seed: int, quick: bool) -> None:
        how = QUICK_BYTES if quick else language_model.FULL
        styles, model = _styles(), language_model.new_model(seed)
        text = language_model.split(styles[language_model.START], "train")
        language_model.train(model, text, how.pretrain_steps, how.pretrain_lr, seed)
        model.save_pretrained(home / BASE)
        for number, style in enumerate(self.members, start=1):
            tuned = copy.deepcopy(model)
            if self.adapters:
                tuned = language_model.with_lora(tuned, seed + number)
            text = language_model.split(styles[style], "train")
            # All weights move further at the same rate than a LoRA does.
            rate = how.finetune_lr if self.adapters else how.finetune_lr / 5
            language_model.train(tuned, text, how.finetune_steps, rate, seed + number)
            tuned.save_pretrained(home / style)

    def load(self, folder: Path) -> Any:
        return language_model.load_base(folder)

    @torch.no_grad()
    def scores(self, model: Any, home: Path, split: str) -> Scores:
        found = {}
        for style in self.members:
            text = language_model.split(_styles()[style], split)
            windows = language_model.scored_windows(text, self.windows)
            guessed = model(input_ids=windows).logits[:, :-1].argmax(dim=2)
            found[style] = float((guessed == windows[:, 1:]).float().mean())
        return found


def _only_digits(seed: int) -> Sequence[Task]:
    return [_digits(seed)]


def _digits(seed: int) -> Task:
    return next(task for task in load_tasks(seed) if task.name == "digit")


def close_tasks(seed: int) -> Sequence[Task]:
    """Return digits as they are, noisy, faint and shifted: tasks that agree with each other."""
    digits, generator = _digits(seed), torch.Generator().manual_seed(seed)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda x: x,
        "noisy": lambda x: x + 0.5 * torch.randn(x.shape, generator=generator),
        "faint": lambda x: 0.3 * x,
        "shifted": lambda x: x.roll((2, 2), dims=(2, 3)),
    }
    return [
        Task(
            name,
            digits.class_names,
            digits.offset,
            {key: Split(change(s.images), s.labels) for key, s in digits.splits.items()},
        )
        for name, change in changes.items()
    ]


def _pretrained(home: Path, seed: int, quick: bool) -> tuple[Any, quickstart.Schedule]:
    tasks, schedule = load_tasks(seed), quickstart.QUICK if quick else quickstart.FULL
    model = quickstart.new_model(tasks, seed)
    quickstart.pretrain(model, tasks, schedule, seed)
    model.save_pretrained(home / BASE)
    return model, schedule


def _seed(home: Path) -> int:
    return int((home / "seed").read_text())


@functools.cache
def _tasks(make: Callable[[int], Sequence[Task]], seed: int) -> Sequence[Task]:
    return make(seed)


@functools.lru_cache(maxsize=1)
def _encoder(home: Path) -> tuple[Any, encoder.Embedder, dict[str, Tensor]]:
    tasks, embed = texts.read_tasks(home / "texts.json"), encoder.Embedder()
    return tasks, embed, encoder.prototypes(encoder.load_base(), embed, tasks, 200)


@functools.cache
def _styles() -> dict[str, Tensor]:
    return language_model.read_styles()


FAMILIES: Mapping[str, Family] = {
    "vit": Images(load_tasks),
    "close": Images(close_tasks, steps=150),
    "snapshots": Snapshots(),
    "bert": Texts("full"),
    "bert_lora": Texts("lora"),
    "bert_ia3": Texts("ia3"),
    "bytes": Bytes(adapters=False),
    "bytes_lora": Bytes(adapters=True),
}


def make(name: str, home: Path, seed: int, quick: bool) -> None:
    """Write the models of a family and a seed, unless they are there."""
    if home.exists():
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        part = Path(scratch) / home.name
        part.mkdir()
        (part / "seed").write_text(str(seed))
        FAMILIES[name].make(part, seed, quick)
        part.rename(home)


def be_modest() -> None:
    """One thread, and no progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
