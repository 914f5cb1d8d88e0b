"""A program for two processes: merges, one after another, and who did how much.

Arguments: the folder with ``<name>.yml``, where ``<name>/out`` comes; then the names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext.events import JsonLines
from mergekit_ext.launch import launched

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    posted = []
    with launched() as us:
        post = us.post
        us.post = lambda message: (posted.append(message.handler), post(message))[1]
        for name in sys.argv[2:]:
            posted.clear()
            options = MergeOptions(quiet=True, copy_tokenizer=False)
            events = [JsonLines(folder / f"{name}.jsonl")] if us.is_main else []
            mergekit_ext.merge(
                folder / f"{name}.yml", folder / name / "out", options, callbacks=events
            )
            (folder / f"{name}.{us.rank}.json").write_text(json.dumps(posted))
