"""Exact, base-free merging of LoRA and (IA)^3 adapters, and LoRAs of full fine-tunes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_merge.adapter import Adapter as Adapter
    from peft_merge.adapter import Ia3Adapter as Ia3Adapter
    from peft_merge.adapter import LoraAdapter as LoraAdapter
    from peft_merge.catalogue import methods as methods
    from peft_merge.extraction.run import extract as extract
    from peft_merge.flexmerge.load import load_tasks as load_tasks
    from peft_merge.io import load_adapter as load_adapter
    from peft_merge.io import save_adapter as save_adapter
    from peft_merge.live import add_merged_adapter as add_merged_adapter
    from peft_merge.merge import MergedAdapter as MergedAdapter
    from peft_merge.merge import check as check
    from peft_merge.merge import merge_adapters as merge_adapters
    from peft_merge.merge import run_config as run_config

# Loaded when asked for: torch takes a second, and `peft-merge --help` should not.
_HOMES = {
    "Adapter": "adapter",
    "Ia3Adapter": "adapter",
    "LoraAdapter": "adapter",
    "MergedAdapter": "merge",
    "add_merged_adapter": "live",
    "check": "merge",
    "extract": "extraction.run",
    "load_adapter": "io",
    "load_tasks": "flexmerge.load",
    "merge_adapters": "merge",
    "methods": "catalogue",
    "run_config": "merge",
    "save_adapter": "io",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
