"""Declare each merge method once; mergekit's methods, FlexMerge's F and the adapters' rules follow.

One file holds the methods of one paper, or of papers with one form, and registers them when it is
imported; `methods()` imports all of them.
"""

from mergekit_ext.declared.method import (
    ADAPTERS,
    BLOCKS,
    MODELS,
    Call,
    Inputs,
    Merged,
    Method,
    methods,
    register,
)

__all__ = [
    "ADAPTERS",
    "BLOCKS",
    "MODELS",
    "Call",
    "Inputs",
    "Merged",
    "Method",
    "methods",
    "register",
]
