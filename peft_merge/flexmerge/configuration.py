"""The adapter_config.json of a task whose LoRA shares some modules with others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft_merge.adapter import LoraAdapter, ModuleInfo
from peft_merge.io import names
from peft_merge.io.configuration import lora_configuration
from peft_merge.layouts import LAYOUTS
from peft_merge.patterns import qualified, scaling, targeted_parameters


def task_configuration(
    infos: Mapping[str, ModuleInfo],
    scales: Mapping[str, float],
    shared: Collection[str],
    own: LoraAdapter,
    adapters: Sequence[LoraAdapter],
) -> dict[str, Any]:
    """The task's own configuration, with patterns for what is shared before its own patterns.

    PEFT takes the first pattern that matches. So the task's own factors keep their alphas, whether
    rsLoRA or not, and need no change.

    Args:
        infos: of all modules of the output.
        scales: of them.
        shared: the modules that are shared.
        own: the task's adapter.
        adapters: all tasks' ones.
    """
    parameters = sorted(
        {entry for adapter in adapters for entry in adapter.config.get("target_parameters") or ()}
    )
    config = lora_configuration(infos, [own], own.saved)
    has_parameters = any(info.layout == "parameter" for info in infos.values())
    config |= {"target_parameters": parameters if has_parameters else None}
    if has_parameters:
        config["lora_dropout"] = 0.0  # PEFT has none for target parameters
    config |= {
        "r": own.config.get("r", 8),
        "lora_alpha": own.config.get("lora_alpha", 8),
        "use_rslora": bool(own.config.get("use_rslora")),
    }
    ranks: dict[int, dict[str, None]] = {}
    alphas: dict[float, dict[str, None]] = {}
    for module, info in infos.items():
        owner = names.owner(module, infos)
        rank = LAYOUTS[info.layout].configured_rank(info)
        if module not in shared and _resolves(own, owner, info, rank, scales[module]):
            continue
        key = qualified(owner)
        if info.layout == "parameter":
            leaves = targeted_parameters({"target_parameters": parameters}, owner)
            key = qualified(owner, leaves)
        alpha = _alpha(scales[module], rank, config["use_rslora"])
        ranks.setdefault(rank, {})[key] = None
        alphas.setdefault(alpha, {})[key] = None
    return config | {
        "rank_pattern": {
            **{"|".join(keys): rank for rank, keys in ranks.items()},
            **(own.config.get("rank_pattern") or {}),
        },
        "alpha_pattern": {
            **{"|".join(keys): alpha for alpha, keys in alphas.items()},
            **(own.config.get("alpha_pattern") or {}),
        },
    }


def _resolves(own: LoraAdapter, owner: str, info: ModuleInfo, rank: int, scale: float) -> bool:
    """Whether the task's own patterns say the right thing of a module of its own."""
    if info.layout == "parameter":  # of which the files do not say which pattern is meant
        return True
    found = scaling(own.config, owner)
    return (found.rank, found.scale) == (rank, scale)


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of which PEFT makes exactly this scaling."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / divisor == scale), alpha)
