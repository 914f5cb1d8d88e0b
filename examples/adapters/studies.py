"""The three sets of adapters that are merged: what each is trained on and scored by."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import encoder, language_model, texts

TEXTS = "texts.json"
Scores = dict[str, float]


class Study(Protocol):
    """Adapters of one kind and one base."""

    @property
    def name(self) -> str:
        """Also of the folder with its configurations, and of that with its adapters."""

    @property
    def members(self) -> tuple[str, ...]:
        """One adapter each."""

    @property
    def measure(self) -> str:
        """What is scored."""

    def prepare(self, out: Path, quick: bool, seed: int) -> None:
        """Make what all its adapters need."""

    def train(self, out: Path, member: str, quick: bool, seed: int) -> None:
        """Write the adapter OUT/<name>/<member>."""

    def base(self, out: Path) -> Any:
        """A fresh copy of the model that the adapters belong to."""

    def scores(
        self, model: Any, out: Path, members: Sequence[str], quick: bool
    ) -> dict[str, float]:
        """Of a model, with or without an adapter, on test data."""


@dataclass(frozen=True)
class EncoderStudy:
    """MiniLM on three tasks of text classification."""

    kind: str
    members: tuple[str, ...] = texts.TASKS
    measure: str = "accuracy"

    @property
    def name(self) -> str:
        return f"encoder_{self.kind}"

    def prepare(self, out: Path, quick: bool, seed: int) -> None:
        if not (out / TEXTS).exists():
            texts.write_tasks(out / TEXTS, texts.QUICK if quick else texts.FULL, seed)

    def train(self, out: Path, member: str, quick: bool, seed: int) -> None:
        schedule = encoder.QUICK if quick else encoder.FULL
        tasks, embed, prototypes = _encoder_tools(out, quick)
        model = encoder.new_adapter(self.kind, seed)
        rate = {"lora": schedule.lora_lr, "ia3": schedule.ia3_lr}[self.kind]
        examples = tasks[member]["train"]
        encoder.train(model, embed, prototypes[member], examples, schedule.steps, rate, seed)
        model.save_pretrained(out / self.name / member)

    def base(self, out: Path) -> Any:
        return encoder.load_base()

    def scores(
        self, model: Any, out: Path, members: Sequence[str], quick: bool
    ) -> dict[str, float]:
        tasks, embed, prototypes = _encoder_tools(out, quick)
        return {
            member: encoder.accuracy(model, embed, prototypes[member], tasks[member]["test"])
            for member in members
        }


@dataclass(frozen=True)
class LanguageStudy:
    """A language model of bytes on four kinds of text."""

    name: str = "language_lora"
    members: tuple[str, ...] = language_model.STYLES
    measure: str = "perplexity"

    def prepare(self, out: Path, quick: bool, seed: int) -> None:
        schedule = _language_schedule(quick)
        text = language_model.split(_styles()[language_model.START], "train")
        model = language_model.new_model(seed)
        language_model.train(model, text, schedule.pretrain_steps, schedule.pretrain_lr, seed)
        model.save_pretrained(self._base(out))

    def train(self, out: Path, member: str, quick: bool, seed: int) -> None:
        schedule = _language_schedule(quick)
        text = language_model.split(_styles()[member], "train")
        model = language_model.with_lora(self.base(out), seed)
        language_model.train(model, text, schedule.finetune_steps, schedule.finetune_lr, seed)
        model.save_pretrained(out / self.name / member)

    def base(self, out: Path) -> Any:
        return language_model.load_base(self._base(out))

    def scores(
        self, model: Any, out: Path, members: Sequence[str], quick: bool
    ) -> dict[str, float]:
        count = _language_schedule(quick).test
        return {
            member: language_model.perplexity(
                model, language_model.split(_styles()[member], "test"), count
            )
            for member in members
        }

    def _base(self, out: Path) -> Path:
        return out / self.name / "base"


STUDIES: Mapping[str, Study] = {
    study.name: study for study in (LanguageStudy(), EncoderStudy("lora"), EncoderStudy("ia3"))
}


def mean(study: Study, scores: Mapping[str, float]) -> float:
    """Perplexities are averaged as their logarithms are."""
    if study.measure == "perplexity":
        return math.exp(math.fsum(map(math.log, scores.values())) / len(scores))
    return math.fsum(scores.values()) / len(scores)


@functools.cache
def _encoder_tools(out: Path, quick: bool) -> tuple[Any, encoder.Embedder, Any]:
    tasks, embed = texts.read_tasks(out / TEXTS), encoder.Embedder()
    count = 24 if quick else 200
    return tasks, embed, encoder.prototypes(encoder.load_base(), embed, tasks, count)


@functools.cache
def _styles() -> dict[str, Any]:
    return language_model.read_styles()


def _language_schedule(quick: bool) -> language_model.Schedule:
    return language_model.QUICK if quick else language_model.FULL
