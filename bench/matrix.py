"""Every class of the matrix with every method: right, refused, or wrong.

    python -m bench.matrix                        # all of it, and the table of docs/models.md
    python -m bench.matrix BertModel Mixtral      # the classes whose names hold one of these

The exit code is 1 if a cell is wrong.
"""
from __future__ import annotations
import sys, tempfile, time
from pathlib import Path
import transformers
from tests.matrix.classes import ROWS
from tests.matrix.judge import COLUMNS, Family, judge

def main():
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    asked = sys.argv[1:]
    for row in ROWS:
        if asked and not any(a in row.name for a in asked): continue
        t=time.time()
        with tempfile.TemporaryDirectory() as folder:
            family = Family(row, Path(folder))
            out = {c: judge(family, c) for c in COLUMNS}
        print(f"{row.name:40}", *(f"{v.outcome:8}" for v in out.values()), f"{time.time()-t:.1f}s", flush=True)
        for c, v in out.items():
            if v.why: print(f"   [{c}] {v.outcome}: {v.why}".replace(folder,'')[:1500], flush=True)
if __name__ == "__main__": main()
