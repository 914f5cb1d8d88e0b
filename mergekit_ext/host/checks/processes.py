"""What several processes cannot do together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergekit_ext import ranks
from mergekit_ext.errors import Problem
from mergekit_ext.host.method import ExtMethod
from mergekit_ext.host.methods import is_stock


def sharing_problems(name: str, method: ExtMethod | None, options: Any) -> Iterator[Problem]:
    """What is wrong with a merge for the processes that are to share it; nothing for one alone.

    Args:
        name: the merge method's.
        method: it, if it is one of the project's.
        options: mergekit's.
    """
    size = ranks.current().size
    if size == 1:
        return
    if method is None and is_stock(name):  # an unknown name is another problem
        yield Problem(
            "merge_method",
            f"{name}, which is mergekit's own, in {size} processes",
            "a method of mergekit-ext",
            "Merge in one process; --multi-gpu shares the work out over its GPUs.",
        )
    if not options.safe_serialization:
        yield Problem(
            "--no-safe-serialization",
            f"it, in {size} processes",
            "safetensors, which several processes can write",
            "Leave it out.",
        )
