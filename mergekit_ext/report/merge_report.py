"""`merge_report.json`: everything that the methods reported, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT_NAME = "merge_report.json"


def write_report(
    folder: Path, method: str, tensors: Mapping[str, Mapping[str, Any]], seed: int
) -> None:
    """Write the report of a merge into `folder`.

    Args:
        folder: the output.
        method: the name of the merge method.
        tensors: for each tensor what the method reported: coefficients, norms, iterations, ...
        seed: what random methods drew from; with the same one they draw the same.
    """
    content = {"format_version": 1, "method": method, "seed": seed, "tensors": tensors}
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
