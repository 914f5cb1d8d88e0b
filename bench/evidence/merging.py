"""Merges of a family by the product, and the line from its start through each of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from mergekit.options import MergeOptions

import mergekit_ext
from bench.evidence.families import BASE, Family, State
from bench.evidence.rows import Parameters, Row
from peft_merge import merge_adapters


def merged(family: Family, home: Path, row: Row, parameters: Parameters) -> State:
    """Return the weights of a merge; those of an adapter are merged into its base."""
    shared = {**row.given, **parameters}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if family.adapters:
            sources = [home / member for member in family.members]
            merge_adapters(sources, row.method, parameters=shared).save(out)
            return with_adapter(family, home, out)
        document: dict[str, Any] = {
            "merge_method": row.method,
            "models": [
                {"model": str(home / member), "parameters": dict(row.each)}
                for member in family.members
            ],
            "parameters": shared,
            "dtype": "float32",
        }
        if row.based:
            document["base_model"] = str(home / BASE)
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        mergekit_ext.merge(document, out, options)
        return dict(family.load(out).state_dict())


def with_adapter(family: Family, home: Path, folder: Path) -> State:
    """Return the weights of the start with an adapter."""
    model = peft.PeftModel.from_pretrained(family.load(home / BASE), folder)
    return dict(model.merge_and_unload().state_dict())


def member_of(family: Family, home: Path, name: str) -> State:
    """Return the weights of a member."""
    if family.adapters:
        return with_adapter(family, home, home / name)
    return dict(family.load(home / name).state_dict())


@dataclass(frozen=True)
class Line:
    """Weights ``anchor + t direction``, whose norms are those of changes of `start`."""

    start: State
    anchor: State
    direction: State
    mean_norm: float  # of the inputs' changes

    def at(self, t: float) -> State:
        """Return the weights at t; 1 is the merge that made the line."""
        return {
            name: tensor + t * self.direction[name] if name in self.direction else tensor
            for name, tensor in self.anchor.items()
        }

    def rho(self, t: float) -> float:
        """Return the norm of the change at t over the mean one of the inputs."""
        offset = _difference(self.anchor, self.start)
        changes = [offset[name] + t * d.double() for name, d in self.direction.items()]
        return math.sqrt(math.fsum(float(c.square().sum()) for c in changes)) / self.mean_norm

    def reaching(self, rho: float) -> float:
        """Return the largest t whose norm is `rho`; where none is, that of the least norm."""
        offset = _difference(self.anchor, self.start)
        pairs = [(offset[name], d.double()) for name, d in self.direction.items()]
        a = math.fsum(float(d.square().sum()) for _, d in pairs)
        b = math.fsum(float((o * d).sum()) for o, d in pairs)
        c = math.fsum(float(o.square().sum()) for o, _ in pairs) - (rho * self.mean_norm) ** 2
        return (math.sqrt(max(b * b - a * c, 0.0)) - b) / a if a else 1.0


def line(
    family: Family, home: Path, row: Row, parameters: Parameters, inputs: Sequence[State]
) -> Line:
    """Return the line of a row, through its merge with these parameters."""
    start = dict(family.load(home / BASE).state_dict())
    weights = merged(family, home, row, parameters)
    anchor = start
    if row.anchor is not None and row.factor is not None:
        anchor = merged(family, home, row, {**parameters, row.factor: row.anchor})
    shared = _difference(weights, anchor)
    direction = {name: change.float() for name, change in shared.items()}
    norms = [norm(_difference(state, start)) for state in inputs]
    return Line(start, anchor, direction, math.fsum(norms) / len(norms))


def norm(changes: State) -> float:
    """Return the Frobenius norm of all tensors together."""
    return math.sqrt(math.fsum(float(change.square().sum()) for change in changes.values()))


def _difference(state: State, start: State) -> State:
    return {
        name: tensor.double() - start[name].double()
        for name, tensor in state.items()
        if torch.is_floating_point(tensor) and name in start
    }


def loaded(family: Family, home: Path, state: State) -> Any:
    """Return the family's model with these weights."""
    model = family.load(home / BASE)
    model.load_state_dict(state)
    return model
