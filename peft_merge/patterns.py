r"""Ranks and scalings of modules, resolved exactly as PEFT resolves them.

A key of `rank_pattern` or `alpha_pattern` is a regular expression that must match the end of the
module's name, from its start or after a dot: ``(.*\.)?(key)$`` (PEFT's ``get_pattern_key``); the
first such key in the file's order wins. PEFT then scales by

.. math:: s = \alpha / r \quad\text{or, with rsLoRA,}\quad s = \alpha / \sqrt r

(Hu et al. 2021, section 4.1; Kalajdzievski 2023, "rsLoRA", equation 8).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Fields that together say which modules are adapted.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Scaling:
    """The rank of a module in the configuration, and the factor of its change."""

    rank: int
    scale: float


def scaling(config: Mapping[str, Any], name: str) -> Scaling:
    """What an adapter's configuration says of the module (or target parameter) `name`.

    Raises:
        re.error: a key that is looked at is no regular expression.
    """
    rank = int(_resolved(config.get("rank_pattern"), name, config.get("r", 8)))
    alpha = float(_resolved(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return Scaling(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def keyed(key: str) -> str:
    """What PEFT makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def _resolved(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key in patterns or {}:
        if re.match(keyed(key), name):
            return (patterns or {})[key]
    return (patterns or {}).get(name, default)


def qualified(name: str, leaves: Iterable[str] = ()) -> str:
    r"""A pattern key that matches the module `name` and no other.

    Dots are escaped, and ``^`` keeps ``layers.1.x`` from matching ``encoder.layers.1.x``. With
    `leaves` it matches the parameters of these names in the module instead.
    """
    key = f"^{re.escape(name)}"
    choices = sorted(leaves)
    if not choices:
        return key
    return rf"{key}\.(?:{'|'.join(map(re.escape, choices))})"


def either(keys: Iterable[str]) -> str:
    """One key for what several keys of `qualified` match."""
    chosen = list(keys)
    if len(chosen) == 1:
        return chosen[0]
    return f"^(?:{'|'.join(key.removeprefix('^') for key in chosen)})"


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether `target_modules` selects a module by its name (PEFT's rule for lists and regexes)."""
    chosen = config.get("target_modules") or ()
    if isinstance(chosen, str):
        return re.fullmatch(chosen, module) is not None
    return f".{module}".endswith(tuple(f".{entry}" for entry in chosen))


def adapted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts the module `module` when it loads an adapter of this configuration.

    As PEFT's ``check_target_module_exists`` tells by names, save for `modules_to_save`. Where that
    cannot be told (no `target_modules`, which PEFT then has from a table; "all-linear"; the two
    layers that are tied), True.
    """
    chosen = config.get("target_modules")
    if chosen is None or config.get("ensure_weight_tying"):
        return True
    if isinstance(chosen, str) and chosen.lower() == _ALL_LINEAR:
        return True
    excluded = config.get("exclude_modules")
    if excluded and targeted({"target_modules": excluded}, module):
        return False
    if not targeted(config, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(chosen, str) or module in chosen or layers is None or layers == []:
        return True
    given = config.get("layers_pattern") or []
    given = [given] if isinstance(given, str) else given
    for pattern in [rf"(?:^|.*?\.){each}" for each in given] or [r".*?\.[^.]*"]:
        if (found := re.match(rf"{pattern}\.(?P<idx>\d+)\.", module)) is not None:
            return int(found["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


def targeted_parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Names of the parameters of `module` that `target_parameters` may mean.

    An entry ``experts.up`` means the parameter `up` of every module whose name is ``experts`` or
    ends with ``.experts``; an entry without a dot means any module's. A module that is adapted
    itself has no parameters that are: PEFT refuses both for one module.
    """
    entries = config.get("target_parameters") or ()
    if not entries or targeted(config, module):
        return []
    found = []
    for entry in entries:
        owner, _, leaf = entry.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(leaf)
    return sorted(set(found))


def parameter_scalings(
    config: Mapping[str, Any], module: str, leaves: Sequence[str], stacked: Sequence[int]
) -> list[Scaling] | None:
    """Ranks and scalings of the target parameters of one module, from the outermost wrapper.

    PEFT wraps a module once for each parameter and stores the factors by the wrapper's depth, so
    that a file does not name the parameter. Where the configuration treats parameters differently,
    their order follows if only one order gives all of them the same number of experts.

    Args:
        config: the adapter's.
        module: its name without PEFT's ``base_layer`` parts.
        leaves: the parameters that may be meant.
        stacked: r E of each wrapper, from the outermost.

    Returns:
        One scaling for each wrapper, or None if the file leaves open which one is meant.
    """
    known = {leaf: scaling(config, f"{module}.{leaf}") for leaf in leaves}
    possible = set()
    for order in itertools.permutations(leaves, len(stacked)):
        chosen = tuple(known[leaf] for leaf in order)
        experts = {divmod(size, each.rank) for size, each in zip(stacked, chosen, strict=True)}
        if len(experts) == 1 and next(iter(experts))[1] == 0:
            possible.add(chosen)
    return list(possible.pop()) if len(possible) == 1 else None
