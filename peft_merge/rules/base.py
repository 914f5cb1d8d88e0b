"""What a merge rule is, and the registry of all rules.

A rule sees m tensors of one shape, the changes :math:`\\Delta_i` (or their coordinates: cores of
LoRAs, vectors of (IA)^3), and returns one. It knows nothing of adapters or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.errors import MergeWarning, Problem

# Gives the rows of one tensor in order, some at a time (a vector at once), as float64 tensors of
# the caller's own, each time it is called.
Pieces = Callable[[], Iterator[Tensor]]

# What merges tell: a module's name and report; iteration, objective and change of a solver; the
# same with the module's name first.
OnModule = Callable[[str, Mapping[str, Any]], None]
OnIteration = Callable[[int, float, float], None]
OnModuleIteration = Callable[[str, int, float, float], None]

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
        read: makes the value of what stands there, in place of `kind` and limits; raises
            ValueError.
        expected: what `read` takes, as the end of "expected ...".
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
    read: Callable[[Any], Any] | None = None
    expected: str = ""


# Wide enough for every use, and no sum of weights leaves float64.
_LARGEST_WEIGHT = 1e30
WEIGHT = Parameter(
    "weight",
    float,
    1.0,
    per_model=True,
    low=-_LARGEST_WEIGHT,
    high=_LARGEST_WEIGHT,
    help="of each adapter",
)


@dataclass(frozen=True)
class Settings:
    """The values of a rule's parameters for one module.

    Attributes:
        weights: one for each adapter (NAN's coefficients multiplied in).
        options: the rule's shared parameters, complete.
        each: the rule's per-model parameters other than weight, complete, for each adapter.
    """

    weights: Sequence[float]
    options: Mapping[str, Any]
    each: Sequence[Mapping[str, Any]]

    def call(
        self,
        shape: tuple[int, int],
        generators: Sequence[torch.Generator],
        on_iteration: OnIteration | None = None,
    ) -> Call:
        """What a rule needs to merge one tensor."""
        return Call(self.weights, self.options, self.each, shape, generators, on_iteration)


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
        on_iteration: told of each iteration of an iterative rule.
    """

    weights: Sequence[float]
    options: Mapping[str, Any]
    each: Sequence[Mapping[str, Any]]
    shape: tuple[int, int]
    generators: Sequence[torch.Generator]
    on_iteration: OnIteration | None = None


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
        check_each: yields what is wrong with the per-model parameters of one adapter together
            with the shared options, likewise.
        forewarnings: for so many adapters and the shared options, before anything is read.
        elementwise: whether these shared options take the invariance of an `invariant` rule away.
        blockwise: ``blockwise(sources, call)``: the same as `merge` for matrices, but rows come
            and go in pieces, so that no input is held whole. None where the rule needs them so.
        divides: whether the sum is divided by that of the weights with these shared options.
        coefficients: "nan" if the weights are to be multiplied by NAN's coefficients.
    """

    name: str
    merge: Callable[[Sequence[Tensor], Call], Merged]
    invariant: bool
    parameters: tuple[Parameter, ...] = ()
    check: Callable[[int, Mapping[str, Any]], Iterable[Problem]] = lambda count, options: ()
    check_each: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Problem]] = (
        lambda options, each: ()
    )
    forewarnings: Callable[[int, Mapping[str, Any]], Iterable[MergeWarning]] = (
        lambda count, options: ()
    )
    elementwise: Callable[[Mapping[str, Any]], bool] = lambda options: False
    blockwise: Callable[[Sequence[Pieces], Call], Iterator[Tensor]] | None = None
    divides: Callable[[Mapping[str, Any]], bool] = lambda options: False
    coefficients: str | None = None

    def without_mean(self, settings: Settings) -> bool:
        """Whether these weights sum to 0 where they are divided by.

        Those that NAN's coefficients multiply are only known to when all are 0.
        """
        if not self.divides(settings.options):
            return False
        if self.coefficients is not None:
            return not any(settings.weights)
        return cancelling(settings.weights)

    def invariant_with(self, options: Mapping[str, Any]) -> bool:
        """Whether the rule is rotation-invariant with these shared options."""
        return self.invariant and not self.elementwise(options)

    def defaults(self, count: int) -> Settings:
        """All defaults, weights 1, for so many adapters.

        Raises:
            KeyError: a parameter has no default.
        """
        missing = [p.name for p in self.parameters if p.default is REQUIRED]
        if missing:
            raise KeyError(f"{self.name}: no default for {', '.join(missing)}")
        shared = {p.name: p.default for p in self.parameters if not p.per_model}
        own = {p.name: p.default for p in self.parameters if p.per_model}
        return Settings([1.0] * count, shared, [own] * count)


# What is left of 0.1 + 0.2 - 0.3 in floats is none.
_CANCELLED = 1e-12


def cancelling(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0 but for rounding, so that nothing can be divided by their sum."""
    return abs(math.fsum(weights)) <= _CANCELLED * math.fsum(map(abs, weights))


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


def registered() -> tuple[Rule, ...]:
    """The rules that are registered so far."""
    return tuple(_RULES.values())


def rules() -> Mapping[str, Rule]:
    """All rules by name, those of the project included."""
    from peft_merge.rules import catalogue

    catalogue.load()
    return dict(_RULES)
