"""A saved state, read field by field: it may come from somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.callbacks.settings import SUBJECT
from mergekit_ext.errors import ConfigError, Problem

_REMEDY = "Load a state that the same callback with the same arguments has saved."
_MOST_DIGITS = 18  # of a step


class Saved:
    """One value of a state, and where it stands.

    Attributes:
        value: as it was saved.
        where: the way to it, for messages.

    Every method raises `ConfigError` if the value is of another kind than what it gives.
    """

    def __init__(self, value: Any, where: str = "state"):
        self.value, self.where = value, where

    def __getitem__(self, name: str) -> Saved:
        """A field that must be there."""
        fields = self.fields()
        if name not in fields:
            raise self.refused(f"the field `{name}`")
        return fields[name]

    def fields(self) -> dict[str, Saved]:
        """All fields, by name."""
        if not isinstance(self.value, Mapping) or not all(isinstance(k, str) for k in self.value):
            raise self.refused("fields by name")
        return {name: Saved(value, f"{self.where}.{name}") for name, value in self.value.items()}

    def by_step(self) -> dict[int, Saved]:
        """Fields whose names are steps, in their order."""
        fields = self.fields()
        if not all(k.isascii() and k.isdecimal() and len(k) <= _MOST_DIGITS for k in fields):
            raise self.refused("snapshots by step")
        return dict(sorted((int(step), field) for step, field in fields.items()))

    def text(self) -> str:
        """A text."""
        if not isinstance(self.value, str):
            raise self.refused("a text")
        return self.value

    def count(self) -> int:
        """A whole number, not negative."""
        if type(self.value) is not int or self.value < 0:
            raise self.refused("a whole number, at least 0")
        return self.value

    def counts(self) -> list[int]:
        """Whole numbers."""
        if not isinstance(self.value, (list, tuple)):
            raise self.refused("whole numbers")
        return [Saved(item, self.where).count() for item in self.value]

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name."""
        fields = self.fields()
        if not all(isinstance(field.value, Tensor) for field in fields.values()):
            raise self.refused("tensors by name")
        return {name: field.value for name, field in fields.items()}

    def dtypes(self) -> dict[str, str]:
        """Names of torch's dtypes, by name."""
        found = {name: field.text() for name, field in self.fields().items()}
        if not all(isinstance(getattr(torch, d, None), torch.dtype) for d in found.values()):
            raise self.refused("dtypes of torch by name")
        return found

    def refused(self, expected: str) -> ConfigError:
        """The error that another kind of value than `expected` is."""
        kind = type(self.value).__name__
        found = ", ".join(map(str, self.value)) if isinstance(self.value, Mapping) else ""
        found = f"a {kind}" + f" of {found[:80]}" * bool(found)
        return ConfigError([Problem(self.where, found, expected, _REMEDY)], SUBJECT)
