"""The whole matrix of classes and methods, and the table of docs/models.md.

    python -m bench.matrix                    # all of it
    python -m bench.matrix BertModel Mixtral  # the classes whose names hold one of these

Writes the rows that were run into the table. Prints what is wrong as soon as it is seen, and
refusals for a reason that docs/models.md does not list; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import transformers

from tests.matrix.classes import ROWS
from tests.matrix.family import Family
from tests.matrix.judge import COLUMNS, REFUSED, RIGHT, Verdict, judge
from tests.matrix.row import Row

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
_START, _END = "<!-- bench.matrix: start -->\n", "<!-- end -->\n"
# An entry of the page's list of reasons: "3. `words of the message`: ...".
_REASON = re.compile(r"^(\d+)\. `([^`]+)`", re.MULTILINE)
_UNKNOWN = "?"


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
    return f"{REFUSED} ({', '.join(numbers) or _UNKNOWN})"


def line(*texts: str) -> str:
    return f"| {' | '.join(texts)} |\n"


def with_rows(page: str, made: Mapping[str, str]) -> str:
    """The page, with the lines of `made` in its table, which are in the order of the classes."""
    before, _, rest = page.partition(_START)
    table, _, after = rest.partition(_END)
    lines = {text[2:].split(" | ")[0]: text for text in table.splitlines(keepends=True)} | made
    used = ", ".join(f"{n} {metadata.version(n)}" for n in ("transformers", "peft", "mergekit"))
    head = line("class", "kind", *COLUMNS) + line(*["---"] * (2 + len(COLUMNS)))
    body = "".join(lines[row.name] for row in ROWS if row.name in lines)
    return f"{before}{_START}With {used}:\n\n{head}{body}{_END}{after}"


def main() -> None:
    """Judge, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of classes; all by default")
    asked = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    page = _PAGE.read_text()
    reasons = {words: number for number, words in _REASON.findall(page)}
    made, bad = {}, 0
    for row in ROWS:
        if asked and not any(part in row.name for part in asked):
            continue
        verdicts = cells(row)
        texts = [shown(verdict, reasons) for verdict in verdicts.values()]
        made[row.name] = line(row.name, row.kind, *texts)
        print(made[row.name], end="", flush=True)
        for (column, verdict), text in zip(verdicts.items(), texts, strict=True):
            if verdict.outcome not in (RIGHT, REFUSED) or _UNKNOWN in text:
                bad += 1
                print(f"    {column}: {verdict.why}", flush=True)
    _PAGE.write_text(with_rows(page, made))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
