"""Stored names and those of the transformers class, where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def class_names(stored: Iterable[str], config: Any) -> dict[str, str]:
    """What the model's class calls each stored tensor, as transformers renames it on loading.

    Only renamings: tensors that transformers stacks or joins while loading keep their own names,
    and so do all of a class that is not part of transformers, or if two would get one name.

    Args:
        stored: names in the file.
        config: the model's transformers configuration, or None.
    """
    plain = {name: name for name in stored}
    model = _empty_model(config)
    if model is None:
        return plain
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    state = model.state_dict()
    names = {
        name: rename_source_key(name, renamings, [], model.base_model_prefix, state)[0]
        for name in plain
    }
    return names if len(set(names.values())) == len(names) else plain


def _empty_model(config: Any) -> Any:
    """The model of a configuration, without memory for its weights; None if there is no class."""
    import torch
    import transformers

    architecture = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception:  # of any kind; the adapter is refused under the names that are stored
        return None
