"""One configuration with several algorithms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergekit import merge_methods

from mergekit_ext.flexmerge.algorithms import ALGORITHMS
from mergekit_ext.flexmerge.target import ANY_SIZE
from mergekit_ext.host.flexmerge.algorithm import STOCK_PREFIX
from mergekit_ext.host.flexmerge.parameters import OWN

# What only algorithms that trim take.
_OF_TRIMMING = frozenset({"trim_scope", "similarity_on"})
_FOR_ALL = frozenset(spec.name for spec in OWN) - _OF_TRIMMING


def variant(config: Any, algorithm: str, algorithms: Sequence[str]) -> Any:
    """The configuration for one of several algorithms, with a size that all of them reach.

    What only others of `algorithms` take as a parameter is left out: a `density` for TIES does
    not keep EMR from being compared with it. A parameter that none takes stays, to be reported.
    The size that the file asks for is not used.
    """
    elsewhere = frozenset[str]().union(*(_taken(other) for other in algorithms))
    left_out = elsewhere - _FOR_ALL - _taken(algorithm)
    models = [
        item.model_copy(update={"parameters": _without(item.parameters, left_out)})
        for item in config.models or ()
    ]
    count = sum(item.model != config.base_model for item in models)
    parameters = {
        **_without(config.parameters, left_out),
        "algorithm": algorithm,
        # K-means has whole numbers only, a masked merge over a wide base no number at all.
        "target_size": float(max(count, 1)) if _is_kmeans(algorithm) else ANY_SIZE,
    }
    return config.model_copy(update={"models": models or None, "parameters": parameters})


def _taken(algorithm: str) -> frozenset[str]:
    """The names of an algorithm's own parameters; none of an unknown one."""
    if algorithm in ALGORITHMS:
        kind = ALGORITHMS[algorithm]
        names = frozenset(option.name for option in kind.options)
        return names | _OF_TRIMMING if kind.trims else names
    wanted = algorithm.removeprefix(STOCK_PREFIX)
    methods = (m for m in merge_methods.registered_methods() if m.spec.name == wanted)
    return frozenset(spec.name for method in methods for spec in method.spec.parameters)


def _is_kmeans(algorithm: str) -> bool:
    return algorithm in ALGORITHMS and ALGORITHMS[algorithm].kmeans


def _without(parameters: Mapping[str, Any] | None, names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in (parameters or {}).items() if name not in names}
