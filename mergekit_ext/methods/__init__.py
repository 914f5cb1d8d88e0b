"""Declare each merge method once; mergekit's methods, FlexMerge's F and the adapters' rules follow.

One file holds the methods of one paper. A file of this package registers its methods when it is
imported; `methods` imports all of them.
"""

from __future__ import annotations

from mergekit_ext.methods.method import (
    ADAPTERS,
    BLOCKS,
    MODELS,
    Call,
    Inputs,
    Masks,
    Merged,
    Method,
    Settings,
)
from mergekit_ext.methods.registry import methods, register

__all__ = [
    "ADAPTERS",
    "BLOCKS",
    "MODELS",
    "Call",
    "Inputs",
    "Masks",
    "Merged",
    "Method",
    "Settings",
    "methods",
    "register",
]
