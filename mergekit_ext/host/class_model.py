"""The model that a configuration describes, without memory for its weights.

Its class decides what neither names nor shapes of stored tensors show: what transformers calls
them, and how modules use them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mergekit_ext.host.loading import class_of

Rename = Callable[[str], str]


@functools.lru_cache(maxsize=4)
def _built(kind: Any, text: str) -> Any:
    import torch
    from transformers.initialization import no_init_weights

    config = kind.from_dict(json.loads(text))
    architecture = class_of(config)
    if architecture is None:
        return None
    try:
        with torch.device("meta"), no_init_weights():
            return architecture(config)
    except Exception:  # of any kind: whatever the class says to values that it cannot use
        return None


def empty_model(config: Any) -> Any:
    """Return the model of a transformers configuration on the meta device.

    None without a configuration, or if transformers has no such class or cannot build it. Models
    are kept and shared: do not change them.
    """
    if config is None:
        return None
    kind: Any = type(config)
    return _built(kind, config.to_json_string())


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
