"""What a merge method is, parameters, checks and a function of tensors, and which there are."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from mergekit_ext.core.memory import Copies, unknown_copies
from mergekit_ext.core.parameters import WEIGHT, Parameter, Values
from mergekit_ext.errors import MergeError, MergeWarning, Problem

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_ext.kernels.selection import Cut

# The drivers that offer a method: mergekit's YAML, FlexMerge's blocks, adapters.
MODELS, BLOCKS, ADAPTERS = "models", "blocks", "adapters"

# Yields the rows of one tensor in order, some at a time (a vector at once), as float64 tensors
# of the caller's own, each time it is called.
Pieces = Callable[[], Iterator["Tensor"]]


@dataclass(frozen=True)
class Inputs:
    """What a check knows of the inputs."""

    count: int  # besides the base
    based: bool = True  # whether there is a base model
    driver: str = MODELS  # whose users' words messages use
    where: str = "parameters"  # the path of the shared parameters in the user's file
    weights: Sequence[float] | None = None  # of one tensor, where they are known


@dataclass(frozen=True)
class Call:
    """What a method's function knows beyond the tensors: parameters and circumstances."""

    weights: Sequence[float]  # NAN's coefficients multiplied in
    options: Values  # the shared parameters, complete
    each: Sequence[Values]  # the per-model parameters besides weight, of each input
    layout: str = "matrix"  # see `kernels.linear_algebra.matrices_of`
    # Of the change itself, where the tensors are its coordinates in a smaller space.
    short_side: int | None = None
    generators: Sequence[torch.Generator] = ()  # for each tensor, on the CPU
    kept: Sequence[float | Cut] = ()  # of each input: a density, or a cut of its whole model
    # Called by an iterative method with iteration, objective and change.
    on_iteration: Callable[[int, float, float], None] | None = None
    # Of the output, where the result is calibrated before it is cast.
    final: torch.dtype | None = None
    # What is kept of this tensor's solution; the method fills it in where it is empty.
    solution: dict[str, Tensor] | None = None

    def scaled(self, coefficients: Sequence[float]) -> Call:
        """Return the same with the weights multiplied by the inputs' coefficients."""
        pairs = zip(coefficients, self.weights, strict=True)
        return replace(self, weights=[a * weight for a, weight in pairs])


@dataclass(frozen=True)
class Merged:
    """One merged tensor, and what the method reports about it (JSON values).

    Lists of one value for each input are reported by the inputs' names.
    """

    tensor: Tensor
    details: Values = field(default_factory=dict)
    start: Tensor | None = None  # theta_0, where it is estimated
    # Of the inputs' differences from the base, where they are known already.
    norms: Sequence[float] | None = None
    length: float | None = None  # the norm of the merged difference, likewise


OverBase = Callable[["Tensor | None", Sequence["Tensor"], Call, "torch.dtype"], Merged]
Rows = Callable[[Sequence[Pieces], Call], Iterator["Tensor"]]


@dataclass(frozen=True, eq=False)
class Method:
    """A merge method.

    Attributes:
        name: in YAML.
        title: in cards.
        paper: its address.
        use: when to use it, in a sentence.
        example: parameters to start with, where some are required.
        merge: ``merge(changes, call)``: from m task vectors of one shape, float32 or float64, to
            one; ``W_0 + merge(t)`` is the merged weight. Does not change its inputs.
        parameters: without `WEIGHT`, which every method has.
        drivers: which offer it.
        variants: for a driver the parameters that differ there, by name; None takes one away.
        weighs: whether `merge` applies `Call.weights`; otherwise it is given ``w_i t_i``.
        base: whether full models need a base.
        invariant: whether, with these options, rotating all inputs rotates the result likewise, so
            that the small core of a LoRA can stand in for its change.
        elementwise: whether each entry of the result depends on the same entries of the inputs.
        matrices: whether it acts on each matrix of a block by itself.
        over_base: ``over_base(base, models, call, dtype)``: the merged weight from the tensors as
            they are stored, for methods that do it in pieces or estimate the base.
        blockwise: ``blockwise(sources, call)``: the same as `apply` for matrices whose rows come
            and go in pieces.
        linear: ``linear(weights, options)``: c of a plain sum :math:`c \\sum_i w_i t_i`.
        trims: whether task vectors are trimmed to the `density` of their largest entries.
        mask: ``mask(delta, unified, options)``: where a member takes the unified vector, of methods
            whose groups are stored as one vector and one mask for each member.
        rescale: ``rescale(delta, unified)``: the factor of a member's reconstruction.
        kmeans: whether FlexMerge's groups are K-means clusters.
        check: ``check(options, inputs)``: what is wrong with the shared parameters together.
        check_each: what is wrong with the per-model parameters of one input together.
        forewarn: ``forewarn(options, inputs)``: warnings before anything is read.
        after: ``after(name, records)``: warnings about a finished merge, of which `records` are
            the reports of each tensor or module.
        copies: see `memory.Copies`.
        operations: ``operations(models, based, short, long)``: how many of floating point merging
            a matrix usually takes, where that is long.
        divides: whether the sum is divided by that of the weights with these options.
        orthogonal: whether the parts of its inputs are made orthogonal to each other, so that their
            squared norms add up.
        solves: which options change how a solution is used, where there is one without a base.
        nan: whether the weights are multiplied by NAN's coefficients.
    """

    name: str
    title: str
    paper: str | None
    merge: Callable[[Sequence[Tensor], Call], Merged]
    parameters: tuple[Parameter, ...] = ()
    drivers: frozenset[str] = frozenset({MODELS, BLOCKS, ADAPTERS})
    variants: Mapping[str, Mapping[str, Parameter | None]] = field(default_factory=dict)
    weighs: bool = False
    base: bool = True
    invariant: Callable[[Values], bool] = lambda options: False
    elementwise: bool = False
    matrices: bool = False
    over_base: OverBase | None = None
    blockwise: Rows | None = None
    linear: Callable[[Sequence[float], Values], float] | None = None
    trims: bool = False
    mask: Callable[[Tensor, Tensor, Values], Tensor] | None = None
    rescale: Callable[[Tensor, Tensor], float] = lambda delta, unified: 1.0
    kmeans: bool = False
    check: Callable[[Values, Inputs], Iterable[Problem]] = lambda options, inputs: ()
    check_each: Callable[[Values], Iterable[Problem]] = lambda values: ()
    forewarn: Callable[[Values, Inputs], Iterable[MergeWarning]] = lambda *inputs: ()
    after: Callable[[str, Mapping[str, Values]], Iterable[MergeWarning]] = lambda name, records: ()
    copies: Copies = unknown_copies
    operations: Callable[[int, bool, int, int], float] | None = None
    divides: Callable[[Values], bool] = lambda options: False
    orthogonal: bool = False
    solves: frozenset[str] = frozenset()
    nan: bool = False
    use: str = ""
    example: Values = field(default_factory=dict)

    def for_driver(self, driver: str) -> tuple[Parameter, ...]:
        """Return all parameters that a driver's users can give."""
        found = {p.name: p for p in (*self.parameters, WEIGHT)}
        found |= self.variants.get(driver, {})  # type: ignore[arg-type]
        return tuple(p for p in found.values() if p is not None)

    def apply(self, changes: Sequence[Tensor], call: Call) -> Merged:
        """Return the merge of changes that stay as they are, weights applied."""
        if not self.weighs:
            changes = [t * weight for t, weight in zip(changes, call.weights, strict=True)]
        return self.merge(changes, call)

    def without_mean(self, settings: Call) -> bool:
        """Return whether these weights sum to 0 where they are divided by."""
        if not self.divides(settings.options):
            return False
        # NAN's coefficients are not known yet.
        return not any(settings.weights) if self.nan else cancelling(settings.weights)


_METHODS: dict[tuple[str, str], Method] = {}


def register(method: Method) -> Method:
    """Add a method for each of its drivers.

    Raises:
        ValueError: a driver has a method of this name already.
    """
    keys = [(driver, method.name) for driver in sorted(method.drivers)]
    for key in keys:
        if key in _METHODS:
            raise ValueError(f"{method.name}: {key[0]} have a merge method of this name already")
    _METHODS.update(dict.fromkeys(keys, method))
    return method


def methods(driver: str) -> Mapping[str, Method]:
    """Return the methods that a driver offers by the names that they have in YAML."""
    _load()
    return {name: method for (owner, name), method in _METHODS.items() if owner == driver}


@cache
def _load() -> None:
    package = importlib.import_module("mergekit_ext.declared")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def factor_in(options: Iterable[str]) -> str:
    """Return which shared parameter the whole merged task vector is multiplied by; "" for none."""
    return next((name for name in ("scale", "lambda") if name in options), "")


def factor_of_snapshots(defaults: Values) -> str:
    """Return which factor is `auto` in merges of snapshots of one run; "" for none.

    By their `defaults` methods add up task vectors, but those of snapshots are nearly the same one.
    Others divide by the weights.
    """
    name = factor_in(defaults)
    means = name == "lambda" and defaults.get("normalize") is True
    return "" if means else name


# What is left of 0.1 + 0.2 - 0.3 in floats is none.
_CANCELLED = 1e-12


def cancelling(weights: Sequence[float]) -> bool:
    """Return whether weights sum to 0 but for rounding."""
    return abs(math.fsum(weights)) <= _CANCELLED * math.fsum(map(abs, weights))


def divisor(weights: Sequence[float], instead: str = "") -> float:
    """Return the sum of the weights, or raise `MergeError`, which names the option `instead`.

    Checks refuse weights that sum to 0 before work. Those of a group of FlexMerge's, or with
    NAN's coefficients, are known only here.
    """
    if cancelling(weights):
        remedy = f"Use `{instead}`, or change `weight`." if instead else "Change `weight`."
        raise MergeError(f"weights that sum to 0, which have no mean: {list(weights)}. {remedy}")
    return math.fsum(weights)


def layout_of(name: str, axes: int) -> str:
    """Return how kernels see a tensor: as a matrix, stacked matrices, or flattened.

    Four axes and more are convolutions, and three are stacked experts unless the name says
    convolution: shapes alone do not distinguish a one-dimensional one.
    """
    if axes <= 2:
        return "matrix"
    return "flattened" if axes > 3 or "conv" in name.lower() else "stacked"
