"""A row of the matrix: one class of transformers, made small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Row:
    """One class as users meet it.

    Attributes:
        name: the class, and what sets it apart from another row of the same class.
        kind: what such models are for.
        make: build one with random weights.
        lora: what PEFT's `target_modules` is for an adapter of it.
        stacks: what PEFT's `target_parameters` is.
        heads: first parts of the names that docs/blocks.md calls heads of one task.
    """

    name: str
    kind: str
    make: Callable[[], PreTrainedModel]
    lora: Sequence[str]
    stacks: Sequence[str] = ()
    heads: Sequence[str] = ()


def row(
    name: str,
    kind: str,
    lora: Sequence[str],
    *settings: Mapping[str, Any],
    stacks: Sequence[str] = (),
    heads: Sequence[str] = (),
    **more: Any,
) -> Row:
    """A row; the class is the first word of its name, its configuration takes the rest."""
    model = getattr(transformers, name.split(",")[0])
    given = {key: value for part in (*settings, more) for key, value in part.items()}
    return Row(name, kind, lambda: model(model.config_class(**given)), lora, stacks, heads)
