"""The model that a configuration describes, without memory for its weights.

Its class decides what neither names nor shapes of stored tensors show: what transformers calls
them, and how modules use them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mergekit_ext.host.loading import class_of

Rename = Callable[[str], str]


# Those built last, by their configurations.
_models: dict[str, Any] = {}
_KEPT = 4


def empty_model(config: Any) -> Any:
    """Return the model of a transformers configuration on the meta device.

    None without a configuration, or if transformers has no such class or cannot build it. Models
    are kept and shared: do not change them.
    """
    kind = class_of(config)
    if kind is None:
        return None
    key = f"{kind.__name__} {config.to_json_string()}"
    if key not in _models:
        for oldest in list(_models)[: len(_models) - _KEPT + 1]:
            del _models[oldest]
        _models[key] = _built(kind, copy.deepcopy(config))
    return _models[key]


def _built(kind: Any, config: Any) -> Any:
    import torch
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            return kind(config)
    except Exception:  # of any kind: whatever the class says to values that it cannot use
        return None


@dataclass(frozen=True)
class ClassNames:
    """What the class of a model calls stored tensors.

    Attributes:
        model: the model of the class; None if there is none.
        of: stored name -> the class's.
        converted: those of the class's names whose values transformers changes on loading (stacks,
            splits, transposes).
        rename: a name in an older version of the class -> the class's, without the outer prefix
            that transformers adds or takes away to load one head's checkpoint into another.
    """

    model: Any
    of: dict[str, str]
    converted: frozenset[str]
    rename: Rename


def class_names(stored: Iterable[str], config: Any) -> ClassNames:
    """Name stored tensors as transformers renames them on loading.

    Tensors that transformers stacks or joins while loading keep their own names, and so do all of
    a class that is not part of transformers, or if two would get one name.

    Args:
        stored: names in the file.
        config: the model's transformers configuration, or None.
    """
    plain = {name: name for name in stored}
    model = empty_model(config)
    if model is None:
        return ClassNames(None, plain, frozenset(), str)
    from transformers.core_model_loading import apply_converters, apply_renamings, rename_source_key

    renamings, converters = _transforms(model)
    state = model.state_dict()
    names, converted = {}, set()
    for name in plain:
        names[name], _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if apply_converters(names[name], converters)[1] is not None:
            converted.add(names[name])
    if len(set(names.values())) < len(names):
        return ClassNames(model, plain, frozenset(), str)
    fresh, _ = _transforms(model)  # some know what they have renamed before
    return ClassNames(
        model, names, frozenset(converted), lambda name: str(apply_renamings(name, fresh))
    )


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    return (
        [item for item in transforms if isinstance(item, WeightRenaming)],
        [item for item in transforms if isinstance(item, WeightConverter)],
    )
