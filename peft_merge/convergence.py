"""Iterative rules that stopped before they were done."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mergekit_ext.errors import NotConvergedWarning


def warn_of_late(method: str, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """One warning for all modules whose solver did not reach its tolerance.

    Args:
        modules: what was reported of each; iterative rules say `converged`, `iterations`, `change`.
    """
    late = {name: entry for name, entry in modules.items() if not entry.get("converged", True)}
    if not late:
        return
    worst = max(late, key=lambda name: late[name]["change"])
    warnings.warn(
        NotConvergedWarning(
            f"{method}: {len(late)} of {len(modules)} modules did not reach the tolerance in "
            f"{late[worst]['iterations']} iterations; the largest change left is "
            f"{late[worst]['change']:.1e}, in {worst}. Raise `max_iterations` or `tolerance`."
        ),
        stacklevel=5,
    )
