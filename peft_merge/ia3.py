r"""Merging (IA)^3 adapters: multiplicative vectors, whose identity is 1.

(IA)^3 (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning", arXiv:2205.05638, section 3.3) multiplies a module's output, or the input of
a feedforward module, with a vector :math:`\ell`. The paper says nothing on merging. Here a vector
is a change of the vector of ones, and a merge rule F sees the changes:

- additive: :math:`\ell = 1 + F(\ell_1 - 1, \dots, \ell_m - 1)`;
- log: :math:`\ell = \exp F(\log \ell_1, \dots, \log \ell_m)`, so that a linear rule gives the
  weighted geometric mean: the function of adapters applied one after the other.

An adapter without a module counts as :math:`\ell_i = 1` there, which is a change of zero in both.
So no weights, whatever their sum, scale a module that no adapter has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError, Problem
from mergekit_ext.kernels.linear_algebra import norm
from peft_merge.adapter import Ia3Adapter, VectorInfo
from peft_merge.rules.base import OnModule, OnModuleIteration, Rule, Settings
from peft_merge.rules.seeds import generators

Space = Literal["additive", "log"]


@dataclass(frozen=True)
class _Coordinates:
    """Where changes are merged: from vectors to it, and back."""

    change: Callable[[Tensor], Tensor]
    vector: Callable[[Tensor], Tensor]


_SPACES: dict[str, _Coordinates] = {
    "additive": _Coordinates(lambda vector: vector - 1, lambda change: 1 + change),
    "log": _Coordinates(torch.log, torch.exp),
}


def merge_ia3(
    adapters: Sequence[Ia3Adapter],
    rule: Rule,
    resolve: Callable[[str], Settings],
    *,
    space: Space = "additive",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_module: OnModule | None = None,
    on_iteration: OnModuleIteration | None = None,
) -> tuple[dict[str, Tensor], dict[str, VectorInfo], dict[str, dict[str, Any]]]:
    """Merge the vectors of every module that some adapter has.

    Args:
        adapters: m of them; their modules are united.
        rule: sees m float64 vectors of shape (length,).
        resolve: a module's weights (NAN's coefficients multiplied in) and parameters.
        space: `additive` or `log`, see above.
        dtype: of the results, cast to once; default: the vectors' own, promoted where they differ.
        device: where the rule runs; results lie there.
        seed: of random rules.
        on_module: called after each module with its name and report.
        on_iteration: called after each iteration of a solver, as in `merge_lora`.

    Returns:
        The merged vectors in their stored shapes, what they are, and for each module a report:
        `shape`, `feedforward`, `adapters` (how many have it) and the rule's details.

    Raises:
        ConfigError: an unknown space, one module that is feedforward in some adapters and not in
            others, or of different shapes; in log space values that are not positive. Before
            anything is merged, all of them together.
        NonFiniteError: a vector holds NaN or infinity.
        MergeError: a merged vector overflows `dtype`.
    """
    check(adapters, space)
    vectors: dict[str, Tensor] = {}
    infos: dict[str, VectorInfo] = {}
    report: dict[str, dict[str, Any]] = {}
    for module in _modules(adapters):
        own = [adapter.infos[module] for adapter in adapters if module in adapter.infos]
        info = replace(own[0], dtype=dtype or reduce(torch.promote_types, (i.dtype for i in own)))
        vectors_in = changes(adapters, module, space=space, device=device)
        shape = (1, len(vectors_in[0]))
        call = resolve(module).call(
            shape,
            generators(seed, module, len(adapters)),
            None if on_iteration is None else partial(on_iteration, module),
        )
        merged = rule.merge(vectors_in, call)
        vector = _SPACES[space].vector(merged.tensor.to(torch.float64)).to(info.dtype)
        if not bool(torch.isfinite(vector).all()):
            raise MergeError(
                f"{module}: the merged vector leaves the range of {info.dtype}. Use smaller "
                "weights, or a wider dtype."
            )
        vectors[module], infos[module] = vector.reshape(info.shape), info
        report[module] = {
            "shape": list(info.shape),
            "feedforward": info.feedforward,
            "adapters": len(own),
            **merged.details,
        }
        if on_module is not None:
            on_module(module, report[module])
    return vectors, infos, report


def changes(
    adapters: Sequence[Ia3Adapter],
    module: str,
    *,
    space: Space = "additive",
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """What a rule sees of a module that one of the adapters has: m float64 vectors (length,).

    Raises:
        NonFiniteError: a vector holds NaN or infinity.
    """
    shape = next(adapter.infos[module].shape for adapter in adapters if module in adapter.infos)
    nothing = torch.zeros(torch.Size(shape).numel(), dtype=torch.float64, device=device)
    return [
        _change(adapter, module, space).to(device).flatten()
        if module in adapter.infos
        else nothing.clone()
        for adapter in adapters
    ]


def norms(adapters: Sequence[Ia3Adapter], *, space: Space = "additive") -> dict[str, list[float]]:
    """Lengths of the changes that a rule sees, for NAN: of each module, one for each adapter.

    Raises:
        ConfigError, NonFiniteError: as `merge_ia3`.
    """
    check(adapters, space)
    return {
        module: [
            norm(_change(adapter, module, space)) if module in adapter.infos else 0.0
            for adapter in adapters
        ]
        for module in _modules(adapters)
    }


def check(adapters: Sequence[Ia3Adapter], space: str) -> None:
    """Whether the vectors can be merged in a space.

    Raises:
        ConfigError, NonFiniteError: as `merge_ia3`.
    """
    problems = [
        *_bad_space(space),
        *(p for name in _modules(adapters) for p in _bad(adapters, name)),
    ]
    if not problems and space == "log":
        problems = [p for adapter in adapters for p in _not_positive(adapter)]
    if problems:
        raise ConfigError(problems, "this merge of (IA)^3 adapters")


def _change(adapter: Ia3Adapter, module: str, space: Space) -> Tensor:
    return _SPACES[space].change(_read(adapter, module))


def _modules(adapters: Sequence[Ia3Adapter]) -> list[str]:
    """All modules, in the order in which they first occur."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.infos))


def _read(adapter: Ia3Adapter, module: str) -> Tensor:
    vector = adapter.load(module)
    bad = int((~torch.isfinite(vector)).sum())
    if bad:
        raise NonFiniteError(module, adapter.name, bad, vector.numel())
    return vector.to(torch.float64)


def _bad_space(space: str) -> list[Problem]:
    if space in _SPACES:
        return []
    remedy = "`rank` and the spaces of LoRA (delta, core, ...) mean nothing for vectors."
    return [Problem("space", repr(space), " or ".join(get_args(Space)), remedy)]


def _bad(adapters: Sequence[Ia3Adapter], module: str) -> list[Problem]:
    """What keeps the adapters' vectors of one module apart."""
    own = {adapter.name: adapter.infos[module] for adapter in adapters if module in adapter.infos}
    if len({info.feedforward for info in own.values()}) > 1:
        kinds = {True: "feedforward (inputs)", False: "not feedforward (outputs)"}
        return [
            Problem(
                module,
                ", ".join(f"{kinds[info.feedforward]} in {name}" for name, info in own.items()),
                "one kind: a vector for inputs and one for outputs cannot be combined",
                "Merge adapters whose `feedforward_modules` agree.",
            )
        ]
    if len({info.shape for info in own.values()}) > 1:
        shapes = ", ".join(f"{tuple(info.shape)} in {name}" for name, info in own.items())
        return [Problem(module, shapes, "one shape", "Merge adapters of one base model.")]
    return []


def _not_positive(adapter: Ia3Adapter) -> list[Problem]:
    problems = []
    for module in adapter.infos:
        vector = _read(adapter, module)
        smallest = float(vector.min()) if vector.numel() else 1.0
        if smallest <= 0:
            problems.append(
                Problem(
                    f"{module} of adapter {adapter.name}",
                    f"a smallest value of {smallest:.6g}",
                    "positive values, of which logarithms exist",
                    "Use `space: additive`.",
                )
            )
    return problems
