"""Merged adapters in memory: tensors, and a configuration under which PEFT loads exactly them.

`target_modules` is the inputs' own where it gives exactly the modules of the output: all inputs
agree in it, in what goes with it and in their modules. Otherwise it lists every module by its full
name. PEFT takes such a name for the end of a name as well, so a base that has both ``proj`` and
``deep.proj`` gets a further module; it is initialised as no change and therefore is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io import names, whole
from peft_merge.io.compatible import has_layers
from peft_merge.io.layouts import at_rank, configured_rank, filled, one_rank, unscaled
from peft_merge.io.targets import SELECTION, Parameters, either, qualified

# PEFT adds a head to `modules_to_save` for these, and then expects its tensors in the file.
_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_TIED = tuple([leaf] for leaf in whole.TIED)
# PEFT has no bias for these.
_WITHOUT_BIAS = ("embedding", "parameter")


def merged_lora(
    name: str,
    updates: Mapping[str, Update],
    infos: Mapping[str, ModuleInfo],
    inputs: Sequence[LoraAdapter],
    saved: Mapping[str, Tensor] | None = None,
    patterns: bool = False,
) -> LoraAdapter:
    """Make a LoRA of merged changes.

    An adapter means the same to every reader: llama.cpp scales by `lora_alpha` over each tensor's
    rank, vLLM, SGLang and LoRAX by one `lora_alpha` over one `r`, PEFT by patterns as well. So all
    modules have one rank, filled up with zeros, which change nothing, and alpha = r without rsLoRA.

    Args:
        name: of the adapter.
        updates: of each module, in the dtype to be stored.
        infos: layout, shape and kernel of each; rank, bias and dtype follow from `updates`.
        inputs: the merged adapters, which agree (`peft_merge.io.compatible`) in all that is not
            merged.
        saved: whole tensors, by the base's names (as in `LoraAdapter.saved`).
        patterns: give each module the least rank, which `rank_pattern` and `alpha_pattern` say;
            only PEFT reads them. Modules that PEFT configures together (both projections of
            torch's attention, the target parameters of one module) have one rank.
    """
    with_bias = any(update.bias is not None for update in updates.values())
    ranked = {
        module: replace(infos[module], rank=max(1, update.a.shape[1]))
        for module, update in updates.items()
    }
    ranks = stored_ranks(ranked, None if patterns else one_rank(ranked.values()))
    stored = {
        module: _filled(unscaled(update), ranks[module], infos[module], with_bias)
        for module, update in updates.items()
    }
    described = {
        module: replace(infos[module], rank=ranks[module], bias=u.bias is not None, dtype=u.a.dtype)
        for module, u in stored.items()
    }
    tensors = saved or {}
    config = lora_configuration(described, inputs, tensors)
    return LoraAdapter(name, config, described, stored.__getitem__, _loaders(tensors))


def merged_ia3(
    name: str,
    vectors: Mapping[str, Tensor],
    infos: Mapping[str, VectorInfo],
    inputs: Sequence[Ia3Adapter],
    saved: Mapping[str, Tensor] | None = None,
) -> Ia3Adapter:
    """Make an (IA)^3 of merged vectors, each in its stored shape and dtype.

    Args:
        name: of the adapter.
        vectors: of each module.
        infos: their shapes and kinds; the dtype follows from `vectors`.
        inputs: the merged adapters, which agree (`peft_merge.io.compatible`) in all that is not
            merged.
        saved: whole tensors, by the base's names.
    """
    described = {
        module: replace(infos[module], dtype=vector.dtype) for module, vector in vectors.items()
    }
    tensors = saved or {}
    config = ia3_configuration(described, inputs, tensors)
    return Ia3Adapter(name, config, described, vectors.__getitem__, _loaders(tensors))


def _loaders(tensors: Mapping[str, Tensor]) -> dict[str, partial[Tensor]]:
    return {key: partial(tensors.__getitem__, key) for key in tensors}


def stored_ranks(infos: Mapping[str, ModuleInfo], r: int | None) -> dict[str, int]:
    """Return the rank that each module is stored with.

    Args:
        infos: with the ranks that the modules need.
        r: that of the whole configuration; None if patterns name the ranks.
    """
    if r is not None:
        return {module: at_rank(info, r) for module, info in infos.items()}
    largest: dict[str, int] = {}
    for module, info in infos.items():
        owner = names.owner(module, infos)
        largest[owner] = max(largest.get(owner, 1), info.rank)
    return {module: largest[names.owner(module, infos)] for module in infos}


def _filled(update: Update, rank: int, info: ModuleInfo, with_bias: bool) -> Update:
    bias = update.bias
    if with_bias and bias is None and info.layout not in _WITHOUT_BIAS:
        bias = torch.zeros(info.matrices * info.rows, dtype=update.b.dtype, device=update.b.device)
    return replace(filled(update, rank), bias=bias)


def lora_configuration(
    infos: Mapping[str, ModuleInfo], inputs: Sequence[Adapter], saved: Iterable[str]
) -> dict[str, Any]:
    """Return that of a LoRA whose modules have alpha = r.

    Patterns name the ranks that are not the largest.

    Args:
        infos: the modules of the output.
        inputs: the merged adapters.
        saved: names of the whole tensors of the output.
    """
    carried = _carried(inputs, saved)
    config = _common("LORA", infos, inputs, carried)
    parameters = sorted(
        {entry for adapter in inputs for entry in adapter.config.get("target_parameters") or ()}
    )
    meant = Parameters(parameters)
    # By rank: PEFT tries every key for every module, which is slow for one key a module.
    keys: dict[int, dict[str, None]] = {}
    modules = set()
    for module, info in infos.items():
        owner = names.owner(module, infos)
        leaves = meant.of(owner) if info.layout == "parameter" else ()
        keys.setdefault(configured_rank(info), {})[qualified(owner, leaves)] = None
        if info.layout != "parameter":
            modules.add(owner)
    largest = max(keys, default=1)
    pattern = {either(keys[rank]): rank for rank in sorted(keys) if rank != largest}
    config |= _selection(infos, inputs, config["modules_to_save"]) or {
        "target_modules": sorted(modules)
    }
    dropout = {adapter.config.get("lora_dropout") or 0.0 for adapter in inputs}
    # Trained biases of the base; and saved embeddings that stand in for the layer tied to them.
    biases = {
        adapter.config.get("bias", "none")
        for adapter, tensor, entry in carried
        if tensor.endswith("bias") and entry is None
    }
    tied = any(
        adapter.config.get("ensure_weight_tying") and tensor.split(".")[-2:-1] in _TIED
        for adapter, tensor, entry in carried
        if entry is not None
    )
    return config | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_bias": any(info.bias for info in infos.values()),
        "lora_dropout": dropout.pop() if len(dropout) == 1 and not parameters else 0.0,
        "bias": next((kind for kind in ("all", "lora_only") if kind in biases), "none"),
        "target_parameters": parameters or None,
        "layer_replication": inputs[0].config.get("layer_replication"),
        "ensure_weight_tying": tied,
    }


def ia3_configuration(
    infos: Mapping[str, VectorInfo], inputs: Sequence[Adapter], saved: Iterable[str]
) -> dict[str, Any]:
    """Return that of an (IA)^3. Arguments as for `lora_configuration`."""
    config = _common("IA3", infos, inputs, _carried(inputs, saved))
    selection = _selection(infos, inputs, config["modules_to_save"], ("feedforward_modules",))
    if selection:
        return config | selection
    feedforward = sorted(module for module, info in infos.items() if info.feedforward)
    # PEFT asks whether a name ends with an entry, with or without a dot before it.
    mistaken = any(
        module.endswith(tuple(feedforward))
        for module, info in infos.items()
        if not info.feedforward
    )
    return config | {
        "target_modules": sorted(infos),
        "feedforward_modules": "|".join(map(re.escape, feedforward)) if mistaken else feedforward,
        "init_ia3_weights": True,
    }


def _carried(
    inputs: Sequence[Adapter], saved: Iterable[str]
) -> list[tuple[Adapter, str, str | None]]:
    """Each whole tensor of the output in each input, with its entry in `modules_to_save`."""
    kept = list(saved)
    return [
        (adapter, tensor, whole.module_to_save(tensor, adapter.config))
        for adapter in inputs
        for tensor in kept
        if tensor in adapter.saved
    ]


def _common(
    kind: str,
    infos: Mapping[str, Any],
    inputs: Sequence[Adapter],
    carried: Sequence[tuple[Adapter, str, str | None]],
) -> dict[str, Any]:
    entries = list(dict.fromkeys(entry for _, _, entry in carried if entry is not None))
    task = _shared(inputs, "task_type")
    if task in _TASKS_WITH_HEADS and not entries:
        heads = (whole.module_to_save(name, a.config) for a in inputs for name in a.saved)
        if any(heads):  # which are dropped
            task = None
    bases = [adapter.config.get("base_model_name_or_path") for adapter in inputs]
    return {
        "peft_type": kind,
        "task_type": task,
        "auto_mapping": _shared(inputs, "auto_mapping"),
        "base_model_name_or_path": next((base for base in bases if base), None),
        "revision": _shared(inputs, "revision"),
        "inference_mode": True,
        "fan_in_fan_out": any(a.config.get("fan_in_fan_out") for a in inputs if has_layers(a)),
        "modules_to_save": entries or None,
    }


def _shared(inputs: Sequence[Adapter], field: str) -> Any:
    """The value of a field if all inputs agree in it."""
    first = inputs[0].config.get(field)
    return first if all(adapter.config.get(field) == first for adapter in inputs) else None


def _selection(
    infos: Mapping[str, Any],
    inputs: Sequence[Adapter],
    modules_to_save: list[str] | None,
    further: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The inputs' own fields if these select the modules of the output."""
    fields = (*SELECTION, *further)
    first = {field: inputs[0].config.get(field) for field in fields}
    for adapter in inputs:
        same = all(_equal(adapter.config.get(field), first[field]) for field in fields)
        # Tied factors become factors of their own, so that the tied layer is to be named, too.
        same = same and not adapter.config.get("ensure_weight_tying")
        # What is saved whole is not adapted.
        saving = _equal(adapter.config.get("modules_to_save") or [], modules_to_save or [])
        if not same or not saving or set(adapter.infos) != set(infos):
            return None
    if any(first[field] is None for field in ("target_modules", *further)):
        return None
    return {field: value for field, value in first.items() if value is not None}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return sorted(map(str, left)) == sorted(map(str, right))
    return bool(left == right)
