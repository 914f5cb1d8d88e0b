"""The whole matrix of classes and methods, and the table of docs/models.md.

    python -m bench.matrix                    # all of it
    python -m bench.matrix BertModel Mixtral  # the classes whose names hold one of these

Writes each row into the table when it has been run. Prints what is wrong as soon as it is seen,
and refusals for a reason that docs/models.md does not list; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import transformers

from tests.matrix.classes import ROWS
from tests.matrix.family import Family
from tests.matrix.judge import COLUMNS, REFUSED, RIGHT, WRONG, Verdict, judge
from tests.matrix.row import Row

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
_START, _END = "<!-- bench.matrix: start -->\n", "<!-- end -->\n"
# An entry of the page's list of reasons: "3. `words of the message`: ...".
_REASON = re.compile(r"^(\d+)\. `([^`]+)`", re.MULTILINE)
_UNKNOWN, _NOT_RUN = "?", "not run"


def cells(row: Row) -> dict[str, Verdict]:
    """The verdicts of one row."""
    with tempfile.TemporaryDirectory() as folder:
        family = Family(row, Path(folder))
        return {column: judged(family, column) for column in COLUMNS}


def judged(family: Family, column: str) -> Verdict:
    """One verdict; what cannot be judged is wrong, and the rest goes on."""
    try:
        return judge(family, column)
    except Exception:
        return Verdict(WRONG, traceback.format_exc(limit=-3))


def shown(verdict: Verdict, reasons: Mapping[str, str]) -> str:
    """A cell of the table; of a refusal, with the number of its reason."""
    if verdict.outcome != REFUSED:
        return verdict.outcome
    numbers = [number for words, number in reasons.items() if words in verdict.why]
    return f"{REFUSED} ({', '.join(numbers) or _UNKNOWN})"


def line(*texts: str) -> str:
    return f"| {' | '.join(texts)} |\n"


def with_rows(page: str, made: Mapping[str, Mapping[str, str]]) -> str:
    """The page, with the cells of `made`, by class and column, in its table."""
    before, _, rest = page.partition(_START)
    table, _, after = rest.partition(_END)
    rows = [text[2:-2].split(" | ") for text in table.splitlines() if text.startswith("| ")]
    known = {name: dict(zip(rows[0][2:], texts, strict=True)) for name, _, *texts in rows}
    used = ", ".join(f"{n} {metadata.version(n)}" for n in ("transformers", "peft", "mergekit"))
    lines = [line("class", "kind", *COLUMNS), line(*["---"] * (2 + len(COLUMNS)))]
    for row in ROWS:
        texts = {**known.get(row.name, {}), **made.get(row.name, {})}
        lines.append(line(row.name, row.kind, *(texts.get(c, _NOT_RUN) for c in COLUMNS)))
    return f"{before}{_START}With {used}:\n\n{''.join(lines)}{_END}{after}"


def main() -> None:
    """Judge, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of classes; all by default")
    asked = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    reasons = {words: number for number, words in _REASON.findall(_PAGE.read_text())}
    bad = False
    for row in ROWS:
        if asked and not any(part in row.name for part in asked):
            continue
        verdicts = cells(row)
        texts = {column: shown(verdict, reasons) for column, verdict in verdicts.items()}
        print(line(row.name, row.kind, *texts.values()), end="", flush=True)
        _PAGE.write_text(with_rows(_PAGE.read_text(), {row.name: texts}))
        for column, verdict in verdicts.items():
            if verdict.outcome not in (RIGHT, REFUSED) or _UNKNOWN in texts[column]:
                bad = True
                print(f"    {column}: {verdict.why}", flush=True)
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
