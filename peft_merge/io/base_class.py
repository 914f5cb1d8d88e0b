"""The class of the adapters' base, which decides the names of modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft_merge.io import names
from peft_merge.io.renamings import Rename


@dataclass(frozen=True)
class BaseClass:
    """A model without memory for its weights.

    Attributes:
        name: of the class.
        places: names of its modules and parameters.
    """

    name: str
    places: frozenset[str]
    _model: Any

    def renaming(self, modules: Iterable[str]) -> Rename:
        """What transformers makes of these names of modules when it loads a checkpoint."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self._model)
        entries = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        found = {}
        for name in modules:
            new, _ = rename_source_key(f"{name}.weight", entries, [], prefix, state)
            found[name] = new.removesuffix(".weight")
        return found.__getitem__

    def has(self, modules: Iterable[str], rename: Rename = str) -> bool:
        """Whether all of an adapter's modules, under other names, are modules of the class."""
        return all(names.unwrapped(rename(name)) in self.places for name in modules)


def base_class(base: object) -> BaseClass | None:
    """Return the class of a base by its folder, or its name in the Hub's cache.

    None if its configuration is not at hand, or names no class of transformers that can be built.
    """
    if not isinstance(base, str) or not base:
        return None
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        kind = getattr(transformers, config.architectures[0])
        with torch.device("meta"), no_init_weights():
            model = kind(config)
    except Exception:  # of any kind: whatever the class says to values that it cannot use
        return None
    places = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    return BaseClass(kind.__name__, frozenset(places), model)
