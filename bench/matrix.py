"""The whole matrix of classes and methods, and the table of docs/models.md.

    python -m bench.matrix                    # all of it; writes the table
    python -m bench.matrix BertModel Mixtral  # the classes whose names hold one of these

Prints what is wrong as soon as it is seen, and why a merge is refused. The exit code is 1 if a cell
is wrong, or refused for a reason that docs/models.md does not list.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import transformers

from tests.matrix.classes import ROWS
from tests.matrix.family import Family
from tests.matrix.judge import COLUMNS, REFUSED, WRONG, Verdict, judge
from tests.matrix.row import Row

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
_START, _END = "<!-- bench.matrix: start -->\n", "<!-- end -->\n"
# An entry of the list of reasons: "3. `words of the message` ...".
_REASON = re.compile(r"^(\d+)\. `([^`]+)`", re.MULTILINE)


def cells(row: Row) -> dict[str, Verdict]:
    """The verdicts of one row."""
    with tempfile.TemporaryDirectory() as folder:
        family = Family(row, Path(folder))
        return {column: judge(family, column) for column in COLUMNS}


def shown(verdict: Verdict, reasons: Mapping[str, str]) -> str:
    """A cell of the table; of a refusal, with the number of its reason."""
    if verdict.outcome != REFUSED:
        return verdict.outcome
    numbers = [number for words, number in reasons.items() if words in verdict.why]
    return f"{REFUSED} ({', '.join(numbers) or '?'})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table under the versions that it was made with."""
    made = [f"{name} {metadata.version(name)}" for name in ("transformers", "peft", "mergekit")]
    head = ["class", "kind", *COLUMNS]
    lines = [head, ["---"] * len(head), *rows]
    return f"{', '.join(made)}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Judge, print, and write the table if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of classes; all by default")
    asked = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    page = _PAGE.read_text()
    reasons = {words: number for number, words in _REASON.findall(page)}
    rows, bad = [], 0
    for row in ROWS:
        if asked and not any(part in row.name for part in asked):
            continue
        verdicts = cells(row)
        texts = [shown(verdict, reasons) for verdict in verdicts.values()]
        rows.append([row.name, row.kind, *texts])
        print(" | ".join(rows[-1]), flush=True)
        for column, verdict in verdicts.items():
            if verdict.outcome == WRONG or "?" in shown(verdict, reasons):
                bad += 1
                print(f"    {column}: {verdict.why}", flush=True)
    if not asked:
        before, _, rest = page.partition(_START)
        _PAGE.write_text(before + _START + table(rows) + _END + rest.partition(_END)[2])
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
