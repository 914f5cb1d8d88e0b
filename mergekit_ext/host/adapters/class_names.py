"""Stored names and those of the transformers class, where they differ."""

from __future__ import annotations

from collections.abc import Iterable


def class_names(stored: Iterable[str], model_type: str | None) -> dict[str, str]:
    """What the modules' class calls each stored tensor, by transformers' own table.

    Only renamings: tensors that transformers stacks or joins while loading keep their stored
    names. Two that would get one name keep theirs too.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    transforms = (get_checkpoint_conversion_mapping(model_type) if model_type else None) or ()
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    names: dict[str, str] = {}
    for name in stored:
        new = name
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        names[name] = new
    if len(set(names.values())) < len(names):
        return {name: name for name in names}
    return names
