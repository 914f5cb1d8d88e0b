"""What a merge rule is, and the registry of all rules.

A rule sees m tensors of one shape, the changes :math:`\\Delta_i` (or their coordinates: cores of
LoRAs, vectors of (IA)^3), and returns one. It knows nothing of adapters or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import Problem

REQUIRED: Any = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rule, as it stands in a YAML file.

    Attributes:
        name: in the YAML file (`lambda`, `density`).
        kind: float, int, bool or str.
        default: `REQUIRED` if there is none; None where leaving it out means something.
        per_model: one value for each adapter; otherwise one for the merge.
        low: smallest value, itself allowed unless `above`.
        high: largest value.
        above: the value must be greater than `low`.
        choices: of a str.
        help: one line for documentation and errors.
    """

    name: str
    kind: type
    default: Any = REQUIRED
    per_model: bool = False
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    help: str = ""


WEIGHT = Parameter("weight", float, 1.0, per_model=True, help="of each adapter")


@dataclass(frozen=True)
class Call:
    """What a rule may know beyond the tensors.

    Attributes:
        weights: one for each tensor (NAN's coefficients multiplied in).
        options: the rule's shared parameters, complete.
        each: the rule's per-model parameters other than weight, for each tensor.
        shape: (rows, columns) of the change itself, of which the tensors may be coordinates;
            (1, length) of a vector.
        generators: one for each tensor, seeded by module and adapter; on the CPU.
    """

    weights: Sequence[float]
    options: Mapping[str, Any]
    each: Sequence[Mapping[str, Any]]
    shape: tuple[int, int]
    generators: Sequence[torch.Generator]


@dataclass(frozen=True)
class Merged:
    """One merged tensor, and what the rule reports about it (JSON values)."""

    tensor: Tensor
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A merge rule.

    Attributes:
        name: in YAML.
        merge: ``merge(tensors, call)``: m float64 or float32 tensors, one shape: (rows, columns)
            for matrices, (length,) for vectors and biases. Never changes its inputs.
        invariant: whether rotating all inputs by the same orthogonal matrices rotates the result
            likewise, so that the small core can stand in for the change itself.
        parameters: without `WEIGHT`, which every rule has.
        check: yields what is wrong with the shared options for so many adapters (beyond what
            `parameters` say), before anything is read.
    """

    name: str
    merge: Callable[[Sequence[Tensor], Call], Merged]
    invariant: bool
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[int, Mapping[str, Any]], Iterable[Problem]] = lambda count, options: ()


_RULES: dict[str, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule under its name.

    Raises:
        ValueError: the name is taken.
    """
    if rule.name in _RULES:
        raise ValueError(f"{rule.name}: there is a merge rule of this name already")
    _RULES[rule.name] = rule
    return rule


def rules() -> Mapping[str, Rule]:
    """All rules by name, those of the project included."""
    from peft_merge.rules import catalogue

    catalogue.load()
    return dict(_RULES)
