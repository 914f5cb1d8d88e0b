r"""The modules that a configuration adapts, and their ranks and scalings, as PEFT has them.

A key of `rank_pattern` or `alpha_pattern` is a regular expression that must match the end of the
module's name, from its start or after a dot: ``(.*\.)?(key)$`` (PEFT's ``get_pattern_key``); the
first such key in the file's order wins. PEFT then scales by

.. math:: s = \alpha / r \quad\text{or, with rsLoRA,}\quad s = \alpha / \sqrt r

(Hu et al. 2021, section 4.1; Kalajdzievski 2023, "rsLoRA", equation 8).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Fields that together say which modules are adapted.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_ALL_LINEAR = "all-linear"


class Parameters:
    """The meaning of a list of `target_parameters`.

    An entry ``experts.up`` means the parameter `up` of every module whose name is ``experts`` or
    ends with ``.experts``; an entry without a dot means any module's.
    """

    def __init__(self, entries: Iterable[str] | None):
        self._leaves: dict[str, set[str]] = {}
        for entry in entries or ():
            owner, _, leaf = entry.rpartition(".")
            self._leaves.setdefault(owner, set()).add(leaf)

    def of(self, module: str) -> list[str]:
        """Return the names of the parameters of `module` that may be meant."""
        if not self._leaves:
            return []
        found = set(self._leaves.get("", ()))
        return sorted(found.union(*(self._leaves.get(end, ()) for end in _ends(module))))


class Targets:
    """The selection of an adapter's configuration. Made once for all modules of an adapter."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._chosen = _entries(config.get("target_modules"))
        self._excluded = _entries(config.get("exclude_modules"))
        self._parameters = Parameters(config.get("target_parameters"))

    def parameters(self, module: str) -> list[str]:
        """Return the names of the parameters of `module` that `target_parameters` may mean.

        A module that is adapted itself has no parameters that are: PEFT refuses both for one.
        """
        found = self._parameters.of(module)
        return [] if found and _matches(self._chosen, module) else found

    def adapt(self, module: str) -> bool:
        """Return whether PEFT adapts `module` when it loads an adapter of this configuration.

        As PEFT's ``check_target_module_exists`` decides by names, save for `modules_to_save`. Where
        names do not decide (no `target_modules`, which PEFT then has from a table; "all-linear";
        the two layers that are tied), True.
        """
        chosen, config = self._chosen, self._config
        if config.get("target_modules") is None or config.get("ensure_weight_tying"):
            return True
        if isinstance(chosen, str) and chosen.lower() == _ALL_LINEAR:
            return True
        if self._excluded and _matches(self._excluded, module):
            return False
        if not _matches(chosen, module):
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


def _entries(value: Any) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _matches(chosen: str | frozenset[str], module: str) -> bool:
    """PEFT's rule for expressions and for lists: an entry is a name, or its end after a dot."""
    if isinstance(chosen, str):
        return bool(chosen) and re.fullmatch(chosen, module) is not None
    return any(end in chosen for end in _ends(module))


def _ends(module: str) -> Iterator[str]:
    """A name, and what follows each of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


@dataclass(frozen=True)
class Scaling:
    """The rank of a module in the configuration, and the factor of its change."""

    rank: int
    scale: float


def scaling(config: Mapping[str, Any], name: str) -> Scaling:
    """Return the rank and the scaling of the module (or target parameter) `name`.

    Raises:
        re.error: a key that is looked at is no regular expression.
    """
    rank = int(_resolved(config.get("rank_pattern"), name, config.get("r", 8)))
    alpha = float(_resolved(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return Scaling(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def keyed(key: str) -> str:
    """Return the expression that PEFT makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def _resolved(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key in patterns or {}:
        if _compiled(key).match(name):
            return (patterns or {})[key]
    return (patterns or {}).get(name, default)


@lru_cache(1 << 14)
def _compiled(key: str) -> re.Pattern[str]:
    # `re` forgets them from 512 on, and every key is asked for every module.
    return re.compile(keyed(key))


def qualified(name: str, leaves: Iterable[str] = ()) -> str:
    r"""Return a pattern key that matches the module `name` and no other.

    Dots are escaped, and ``^`` keeps ``layers.1.x`` from matching ``encoder.layers.1.x``. With
    `leaves` it matches the parameters of these names in the module instead.
    """
    key = f"^{re.escape(name)}"
    choices = sorted(leaves)
    return rf"{key}\.(?:{'|'.join(map(re.escape, choices))})" if choices else key


def either(keys: Iterable[str]) -> str:
    """Return one key for what several keys of `qualified` match."""
    chosen = list(keys)
    if len(chosen) == 1:
        return chosen[0]
    return f"^(?:{'|'.join(key.removeprefix('^') for key in chosen)})"


def parameter_scalings(
    config: Mapping[str, Any], module: str, leaves: Sequence[str], stacked: Sequence[int]
) -> list[Scaling] | None:
    """Return ranks and scalings of a module's target parameters, from the outermost wrapper.

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
    alike: dict[int, list[Scaling]] = {}
    for leaf in leaves:
        each = scaling(config, f"{module}.{leaf}")
        alike.setdefault(each.rank, []).append(each)
    # The number of experts gives the rank of every wrapper.
    outermost = stacked[0] if stacked else 0
    orders = []
    for experts in {outermost // rank for rank in alike if outermost and outermost % rank == 0}:
        ranks = [size // experts if size % experts == 0 else 0 for size in stacked]
        if all(len(alike.get(rank, ())) >= count for rank, count in Counter(ranks).items()):
            orders.append(ranks)
    if len(orders) != 1 or any(len(set(alike[rank])) > 1 for rank in orders[0]):
        return None
    return [alike[rank][0] for rank in orders[0]]
