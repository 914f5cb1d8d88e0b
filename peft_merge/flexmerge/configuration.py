"""The adapter_config.json of a task whose LoRA shares some modules with others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from peft_merge.adapter import LoraAdapter, ModuleInfo
from peft_merge.io import names
from peft_merge.io.configuration import lora_configuration
from peft_merge.layouts import LAYOUTS
from peft_merge.patterns import qualified, scaling
from peft_merge.targets import Parameters, Targets


def task_configuration(
    infos: Mapping[str, ModuleInfo],
    scales: Mapping[str, float],
    shared: Collection[str],
    own: LoraAdapter,
    adapters: Sequence[LoraAdapter],
) -> dict[str, Any]:
    """The task's own configuration, and a rank and an alpha for each module that has others.

    The task's own factors keep their scalings, whether rsLoRA or not, and need no change. What is
    shared has a scaling of 1: with rsLoRA its alpha is the root of its rank. No two keys match one
    module, so their order does not matter: PEFT sorts them when it saves.

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
    default = (config["r"], config["lora_alpha"])
    patterns: tuple[dict[Any, dict[str, None]], ...] = ({}, {})
    for key, values in _entries(infos, scales, shared, own, parameters):
        for pattern, value, usual in zip(patterns, values, default, strict=True):
            if value != usual:
                pattern.setdefault(value, {})[key] = None
    # By value: PEFT tries every key for every module, which is slow for one key a module.
    ranks, alphas = ({"|".join(keys): value for value, keys in p.items()} for p in patterns)
    return config | {"rank_pattern": ranks, "alpha_pattern": alphas}


def _entries(
    infos: Mapping[str, ModuleInfo],
    scales: Mapping[str, float],
    shared: Collection[str],
    own: LoraAdapter,
    parameters: Sequence[str],
) -> Iterator[tuple[str, tuple[int, float]]]:
    """Keys that match one module each, or one target parameter, and their rank and alpha."""
    rslora = bool(own.config.get("use_rslora"))
    meant, targets = Parameters(parameters), Targets(own.config)
    for module, info in infos.items():
        owner = names.owner(module, infos)
        rank = LAYOUTS[info.layout].configured_rank(info)
        if info.layout != "parameter":
            yield qualified(owner), (rank, _alpha(scales[module], rank, rslora))
        elif module in shared:
            yield qualified(owner, meant.of(owner)), (rank, _alpha(scales[module], rank, rslora))
        else:
            # Files do not name target parameters, so their own patterns say what is whose.
            for leaf in targets.parameters(owner):
                found = scaling(own.config, f"{owner}.{leaf}")
                alpha = _alpha(found.scale, found.rank, rslora)
                yield qualified(owner, [leaf]), (found.rank, alpha)


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """The alpha of which PEFT makes exactly this scaling."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scale * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / divisor == scale), alpha)
