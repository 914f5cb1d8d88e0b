"""The table of docs/numerics.md and the tests of this folder are the same list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "numerics.md"


def rows_tested() -> list[str]:
    return [
        f"{file.name}::{node.name}"
        for file in sorted(HERE.glob("test_*.py"))
        if file != Path(__file__).resolve()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_row_has_its_test_and_every_test_its_row() -> None:
    rows = re.findall(r"^\|[^|]*\|[^|]*\| `(test_\w+\.py::\w+)` \|$", TABLE.read_text(), re.M)
    assert sorted(rows) == sorted(rows_tested())
