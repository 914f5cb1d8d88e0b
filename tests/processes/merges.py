"""A program for two processes: merges, one after another, and how many pieces each has made.

Arguments: the folder with ``<name>.yml``, where ``<name>/out`` comes; then the names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.events import JsonLines
from mergekit_ext.io.pieces import Journal
from mergekit_ext.parallel import launched

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kinds = []
    add = Journal.add
    Journal.add = lambda journal, kind, *rest: (kinds.append(kind), add(journal, kind, *rest))
    with launched() as us:
        for name in sys.argv[2:]:
            kinds.clear()
            options = MergeOptions(quiet=True, copy_tokenizer=False)
            events = [JsonLines(folder / f"{name}.jsonl")] if us.is_main else []
            mergekit_ext.merge(
                folder / f"{name}.yml", folder / name / "out", options, callbacks=events
            )
            made = sum(kind in ("tensor", "block") for kind in kinds)
            (folder / f"{name}.{us.rank}.count").write_text(str(made))
