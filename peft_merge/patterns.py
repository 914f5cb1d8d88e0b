r"""Ranks and scalings of modules, resolved exactly as PEFT resolves them.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


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
        if _compiled(key).match(name):
            return (patterns or {})[key]
    return (patterns or {}).get(name, default)


@lru_cache(1 << 14)
def _compiled(key: str) -> re.Pattern[str]:
    # `re` forgets them from 512 on, and every key is asked for every module.
    return re.compile(keyed(key))


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
