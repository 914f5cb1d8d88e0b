"""A user's file: what mypy must know of the installed packages, and what it must refuse.

`make check` runs mypy in this folder, where it finds the packages as a user does: by `py.typed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import mergekit_ext
import peft_merge
from mergekit_ext import callbacks, flexmerge
from mergekit_ext.errors import Problem
from mergekit_ext.events import MergeBegin


class Shown(callbacks.Callback):
    def on_merge_begin(self, event: MergeBegin) -> None:
        assert_type(event.method, str)


result = mergekit_ext.merge("merge.yml", Path("merged"), callbacks=[Shown()])
assert_type(result.path, Path)
assert_type(result.card, str)
assert_type(mergekit_ext.check("merge.yml").problems, tuple[Problem, ...])
assert_type(mergekit_ext.export("out", "code", "code-alone"), None)
assert_type(peft_merge.extract("base", "tuned", rank=8), peft_merge.MergedAdapter)
assert_type(flexmerge.read_manifest("out"), flexmerge.Manifest)
loaded: Mapping[str, Any] = flexmerge.load("out", max_memory={0: "20GB"})

mergekit_ext.merge("merge.yml", restart="yes")  # type: ignore[arg-type]
mergekit_ext.merged("merge.yml")  # type: ignore[attr-defined]
peft_merge.merged_adapters(["a", "b"])  # type: ignore[attr-defined]
peft_merge.merge_adapters(["a", "b"], density=0.5)  # type: ignore[call-arg]
