"""An adapter under other names of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peft_merge.adapter import Adapter
from peft_merge.io import names, whole
from peft_merge.io.renamings import Rename
from peft_merge.targets import SELECTION, Targets


def renamed(adapter: Adapter, rename: Rename) -> Adapter:
    """Return the adapter under other names, with a configuration that means them."""
    modules = {rename(name): name for name in adapter.infos}
    saved = {rename(name): name for name in adapter.saved}
    infos: dict[str, Any] = {new: adapter.infos[old] for new, old in modules.items()}
    load: Callable[[str], Any] = adapter.load
    changed: dict[str, Any] = {
        "config": _meant(adapter.config, infos, saved),
        "infos": infos,
        "load": lambda name: load(modules[name]),
        "saved": {new: adapter.saved[old] for new, old in saved.items()},
    }
    return replace(adapter, **changed)


def _meant(
    config: Mapping[str, Any], infos: Mapping[str, Any], saved: Mapping[str, str]
) -> dict[str, Any]:
    """A configuration that selects these modules and saves these tensors."""
    owners = sorted({names.owner(name, infos) for name in infos})
    targets, result = Targets(config), dict(config)
    linear = [owner for owner in owners if not targets.parameters(owner)]
    if not all(map(targets.adapt, linear)):
        result |= dict.fromkeys(SELECTION) | {"target_modules": linear}
    entries = [
        new.rpartition(".")[0]
        for new, old in saved.items()
        if whole.module_to_save(old, config) and not whole.module_to_save(new, config)
    ]
    if entries:
        result["modules_to_save"] = [*config["modules_to_save"], *dict.fromkeys(entries)]
    return result
