"""Every rule of the project: importing a family's file registers its rules."""

from __future__ import annotations

import importlib
from functools import cache

# `nan` comes last: it wraps each rule that is registered by then.
FAMILIES = ("linear", "lore", "tsv", "arithmetic", "peft", "pcb", "emr", "nan")


@cache
def load() -> None:
    """Register all rules, once."""
    for family in FAMILIES:
        importlib.import_module(f"peft_merge.rules.{family}")
