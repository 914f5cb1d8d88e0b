"""Merged adapters in memory: tensors, and a configuration under which PEFT loads exactly them.

`target_modules` is the inputs' own where it gives exactly the modules of the output. Otherwise it
lists every module by its full name. PEFT takes such a name for the end of a name as well, so a base
that has both ``proj`` and ``deep.proj`` gets a further module, initialised as no change.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from peft_merge import adapter as data
from peft_merge.adapter import Adapter, Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io import names

# PEFT adds a head to `modules_to_save` for these, and then expects its tensors in the file.
_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# PEFT has no bias for these.
WITHOUT_BIAS = ("embedding", "parameter")

# An input, a whole tensor of it, and the entry of `modules_to_save` that it belongs to.
_Carried = tuple[Adapter, str, str | None]


def merged_adapter(
    name: str,
    values: Mapping[str, Any],
    infos: Mapping[str, Any],
    inputs: Sequence[Adapter],
    saved: Mapping[str, Tensor] | None = None,
    patterns: bool = False,
) -> Adapter:
    """Make an adapter of merged changes: an `Update`, or a vector as it is stored, for each module.

    A LoRA means the same to every reader: llama.cpp scales by `lora_alpha` over each tensor's
    rank, SGLang and LoRAX by one `lora_alpha` over one `r`, PEFT and vLLM by patterns as well. So
    all modules have one rank, filled up with zeros, and alpha = r without rsLoRA; with `patterns`
    each has the least. Ranks, biases and dtypes in `infos` are ignored.
    """
    tensors = saved or {}
    whole = {key: partial(tensors.__getitem__, key) for key in tensors}
    if isinstance(inputs[0], Ia3Adapter):
        vectors = {module: replace(infos[module], dtype=v.dtype) for module, v in values.items()}
        config = ia3_configuration(vectors, inputs, tensors)
        return Ia3Adapter(name, config, vectors, values.__getitem__, whole)
    with_bias = any(update.bias is not None for update in values.values())
    needed = {m: replace(infos[m], rank=max(1, v.a.shape[1])) for m, v in values.items()}
    ranks = stored_ranks(needed, None if patterns else data.one_rank(needed.values()))
    stored: dict[str, Update] = {}
    for module, update in values.items():
        info, rank = infos[module], ranks[module]
        stored[module] = found = update.unscaled().filled(rank)
        if with_bias and found.bias is None and info.layout not in WITHOUT_BIAS:
            zeros = found.b.new_zeros(info.matrices * info.rows)
            stored[module] = found = replace(found, bias=zeros)
        needed[module] = replace(info, rank=rank, bias=found.bias is not None, dtype=found.a.dtype)
    config = lora_configuration(needed, inputs, tensors)
    return LoraAdapter(name, config, needed, stored.__getitem__, whole)


def adapter_of(
    name: str,
    infos: Mapping[str, ModuleInfo],
    load: Callable[[str], Update],
    stated: Mapping[str, Any],
    saved: Mapping[str, Callable[[], Tensor]],
) -> LoraAdapter:
    """Make a LoRA of changes that come from no adapter: of those in `infos`, as they are stored.

    `stated` are the fields of its configuration that modules and ranks do not decide
    (`peft_merge.layers.config_of`).
    """
    given, tied = LoraAdapter(name, stated, infos, load, saved), "ensure_weight_tying"
    return replace(given, config=lora_configuration(infos, [given], saved) | {tied: stated[tied]})


def stored_ranks(infos: Mapping[str, ModuleInfo], r: int | None) -> dict[str, int]:
    """Return the rank that each module is stored with, where it needs that of its info.

    `r` is that of the whole configuration; None if patterns name the ranks, which are one for
    modules that PEFT configures together.
    """
    if r is not None:
        return {module: r // info.groups for module, info in infos.items()}
    largest: dict[str, int] = {}
    for module, info in infos.items():
        owner = names.owner(module, infos)
        largest[owner] = max(largest.get(owner, 1), info.rank)
    return {module: largest[names.owner(module, infos)] for module in infos}


def lora_configuration(
    infos: Mapping[str, ModuleInfo], inputs: Sequence[Adapter], saved: Iterable[str]
) -> dict[str, Any]:
    """Return the configuration of a LoRA with these modules and names of whole tensors."""
    # Each has alpha = r; patterns name the ranks that are not the largest.
    carried = _carried(inputs, saved)
    config = _common("LORA", infos, inputs, carried, ("target_modules",))
    entries = (adapter.config.get("target_parameters") or () for adapter in inputs)
    parameters = sorted(set().union(*entries))
    targets = names.Targets({"target_parameters": parameters})
    # By rank: PEFT tries every key for every module, which is slow for one key a module.
    keys: dict[int, dict[str, None]] = {}
    modules = set()
    for module, info in infos.items():
        owner = names.owner(module, infos)
        leaves = targets.parameters(owner) if info.layout == "parameter" else ()
        keys.setdefault(info.configured_rank, {})[names.qualified(owner, leaves)] = None
        if info.layout != "parameter":
            modules.add(owner)
    largest = max(keys, default=1)
    pattern = {names.either(keys[rank]): rank for rank in sorted(keys) if rank != largest}
    dropout = {adapter.config.get("lora_dropout") or 0.0 for adapter in inputs}
    # Trained biases of the base; and saved embeddings that stand in for the layer tied to them.
    biases = {
        adapter.config.get("bias", "none")
        for adapter, tensor, entry in carried
        if tensor.endswith("bias") and entry is None
    }
    tied = any(
        adapter.config.get("ensure_weight_tying") and names.is_tied(tensor)
        for adapter, tensor, entry in carried
        if entry is not None
    )
    return {
        "target_modules": sorted(modules),
        **config,
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
    """Return the configuration of an (IA)^3 with these modules and names of whole tensors."""
    own = ("target_modules", "feedforward_modules")
    config = _common("IA3", infos, inputs, _carried(inputs, saved), own)
    if "target_modules" in config:
        return config
    feedforward = sorted(module for module, info in infos.items() if info.feedforward)
    # PEFT asks whether a name ends with an entry, with or without a dot before it.
    others = (module for module, info in infos.items() if not info.feedforward)
    mistaken = any(module.endswith(tuple(feedforward)) for module in others)
    return config | {
        "target_modules": sorted(infos),
        "feedforward_modules": "|".join(map(re.escape, feedforward)) if mistaken else feedforward,
        "init_ia3_weights": True,
    }


def _carried(inputs: Sequence[Adapter], saved: Iterable[str]) -> list[_Carried]:
    """Return each whole tensor of the output in each input, with its entry in `modules_to_save`."""
    kept = list(saved)
    return [
        (adapter, tensor, names.module_to_save(tensor, adapter.config))
        for adapter in inputs
        for tensor in kept
        if tensor in adapter.saved
    ]


def _common(
    kind: str,
    infos: Mapping[str, Any],
    inputs: Sequence[Adapter],
    carried: Sequence[_Carried],
    required: Sequence[str],
) -> dict[str, Any]:
    """Return fields of both kinds; `required` ones where the inputs' own select these modules."""

    def shared(field: str) -> Any:
        first = inputs[0].config.get(field)
        return first if all(adapter.config.get(field) == first for adapter in inputs) else None

    entries = list(dict.fromkeys(entry for _, _, entry in carried if entry is not None))
    task = shared("task_type")
    if task in _TASKS_WITH_HEADS and not entries:
        heads = (names.module_to_save(name, a.config) for a in inputs for name in a.saved)
        if any(heads):  # which are dropped
            task = None
    bases = [adapter.config.get("base_model_name_or_path") for adapter in inputs]
    return {
        "peft_type": kind,
        "task_type": task,
        "auto_mapping": shared("auto_mapping"),
        "base_model_name_or_path": next((base for base in bases if base), None),
        "revision": shared("revision"),
        "inference_mode": True,
        "fan_in_fan_out": any(a.config.get("fan_in_fan_out") for a in inputs if _has_layers(a)),
        "modules_to_save": entries or None,
        **_selection(infos, inputs, entries, required),
    }


def _has_layers(adapter: Adapter) -> bool:
    """Return whether it adapts linear layers, of which alone `fan_in_fan_out` says something."""
    if isinstance(adapter, LoraAdapter):
        return any(info.layout == "linear" for info in adapter.infos.values())
    return any(len(info.shape) == 2 for info in adapter.infos.values())


def _selection(
    infos: Mapping[str, Any], inputs: Sequence[Adapter], entries: list[str], required: Sequence[str]
) -> dict[str, Any]:
    """Return the inputs' own fields if these select the modules of the output."""
    fields = (*required, *names.SELECTION)
    first = {field: inputs[0].config.get(field) for field in fields}
    wanted = [_unordered(value) for value in (entries, *first.values())]

    def selects(adapter: Adapter) -> bool:
        # What is saved whole is not adapted. Tied factors become factors of their own, so that the
        # tied layer is to be named, too.
        values = [adapter.config.get("modules_to_save") or []]
        values += [adapter.config.get(field) for field in first]
        tied = adapter.config.get("ensure_weight_tying")
        same = [*map(_unordered, values)] == wanted
        return same and not tied and adapter.infos.keys() == infos.keys()

    if any(first[field] is None for field in required) or not all(map(selects, inputs)):
        return {}
    return {field: value for field, value in first.items() if value is not None}


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
