"""What is merged: whole models, or adapters. Each kind knows how; nobody else asks which it is."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.callbacks.processes import unwrapped
from mergekit_ext.callbacks.settings import Settings
from mergekit_ext.callbacks.weights import Weights
from mergekit_ext.errors import NonFiniteError, Problem

Shape = tuple[int, ...]


class Kind(ABC):
    """How snapshots of one kind are taken, merged and put into the model."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @abstractmethod
    def view(self, model: Any) -> Weights:
        """The model's weights as they are: no copies, tied ones once."""

    @property
    @abstractmethod
    def needs_base(self) -> bool:
        """Whether the method cannot do without a base."""

    @abstractmethod
    def problems(self, weights: Weights, count: int, has_base: bool) -> Iterable[Problem]:
        """What is wrong with a merge of `count` snapshots like `weights`."""

    @abstractmethod
    def unlike(self, weights: Weights, first: Mapping[str, Shape]) -> Iterable[Problem]:
        """Why a further snapshot cannot be merged with the first, whose shapes are given."""

    @abstractmethod
    def unlike_base(self, weights: Weights, base: Weights) -> Iterable[Problem]:
        """Why a snapshot cannot be merged over a base."""

    @abstractmethod
    def saved(self, checkpoint: Path) -> Path:
        """The folder of the weights in that of a checkpoint."""

    @abstractmethod
    def merge(
        self, snapshots: Mapping[int, Weights], base: Weights | None
    ) -> tuple[Weights, Mapping[str, Any]]:
        """Merge snapshots by step; return new weights, and what the method reports."""

    @abstractmethod
    def blend(self, mean: Weights | None, new: Weights, weight: float) -> Weights:
        """``mean + weight * (new - mean)`` in float32 at least; `mean` may be overwritten."""

    @abstractmethod
    def finished(self, mean: Weights, like: Mapping[str, str]) -> Weights:
        """A mean in the dtypes of the model, by name."""

    @abstractmethod
    def applied(self, model: Any, weights: Weights) -> AbstractContextManager[None]:
        """The model with other weights for a while."""

    @abstractmethod
    def apply(self, model: Any, weights: Weights) -> None:
        """Put weights into the model for good."""

    @abstractmethod
    def share(self, model: Any, weights: Weights | None) -> None:
        """Put those of the main process into the model of every other one; collective."""


def kind_of_model(model: Any, settings: Settings) -> Kind:
    """Adapters for a PeftModel, whole weights for other modules."""
    peft = sys.modules.get("peft")  # who has a PeftModel has imported it
    return _kind(peft is not None and isinstance(unwrapped(model), peft.PeftModel), settings)


def kind_of_weights(weights: Weights, settings: Settings) -> Kind:
    """By what a saved folder holds."""
    return _kind(weights.config is not None, settings)


def _kind(adapters: bool, settings: Settings) -> Kind:
    from mergekit_ext.callbacks.adapters import AdapterWeights
    from mergekit_ext.callbacks.full import FullWeights

    return AdapterWeights(settings) if adapters else FullWeights(settings)


def dtypes(weights: Weights) -> dict[str, str]:
    """The dtype of each tensor, by name."""
    return {k: str(t.dtype).removeprefix("torch.") for k, t in weights.tensors.items()}


@contextmanager
def same_randomness(seed: int) -> Iterator[None]:
    """For a block: random numbers from `seed`; those of the training go on as if nothing was."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def seen(kind: Kind, model: Any, step: int) -> Weights:
    """The model's weights; adapters are looked through when they are seen."""
    try:
        return kind.view(model)
    except NonFiniteError as error:
        where = f"at step {step}"
        raise NonFiniteError(error.tensor, where, error.count, error.size) from None
