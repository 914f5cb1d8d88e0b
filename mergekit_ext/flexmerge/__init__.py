"""FlexMerge checkpoints: several models that share weights, on disk and in memory.

docs/flexmerge-format.md specifies the format. Importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_ext.flexmerge.manifest import Manifest, read_manifest
    from mergekit_ext.flexmerge.routing import Batched
    from mergekit_ext.flexmerge.runtime import load

__all__ = ["Batched", "Manifest", "load", "read_manifest"]

_HOMES = {
    "Batched": "routing",
    "Manifest": "manifest",
    "load": "runtime",
    "read_manifest": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
