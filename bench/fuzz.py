"""Broken and hostile files for every reader, made by Hypothesis from sound ones.

    python -m bench.fuzz --minutes 10            # shared out over the readers
    python -m bench.fuzz --minutes 1 --reader manifest

A reader may take an input, or refuse it with an error of the project. Any other exception, and one
that takes more than 20 seconds, is a failure: its smallest input is written into a folder and
printed with the exception. The exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from mergekit.options import MergeOptions
from safetensors import safe_open

from bench import machine, mutations
from mergekit_ext.errors import MergekitExtError, require
from mergekit_ext.flexmerge import analysis_file
from mergekit_ext.flexmerge.layout import BlockLayout, Layout, Part
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.host.commands import parsed
from mergekit_ext.io.headers import read_folder, read_safetensors
from mergekit_ext.io.journal import Journal
from peft_merge.flexmerge.manifest import open_manifest
from peft_merge.io.read import load_adapter
from peft_merge.merge import check
from tests.attacks.readers import make_inputs
from tests.attacks.weights import joined, split
from tests.models import config

_SECONDS = 20
_SUBJECT = "0" * 64
_MEMORY = 16 << 30
_ROUND = 100


@dataclass(frozen=True)
class Reader:
    """One reader: the file that is changed, what it is changed to, and what reads it."""

    file: Path
    inputs: st.SearchStrategy[bytes]
    read: Callable[[Path], object]


@dataclass
class Tally:
    """What came of one reader. Failures by their kind and place."""

    tried: int = 0
    refused: int = 0
    failures: dict[str, tuple[bytes, str]] = field(default_factory=dict)


def readers(folder: Path) -> dict[str, Reader]:
    """All of them, around sound inputs in `folder`."""
    inputs = make_inputs(folder)
    weights = inputs / "tuned0" / "model.safetensors"
    header, data = split(weights.read_bytes())
    heads = st.one_of(
        mutations.values(header).map(lambda value: joined(value, data)),
        mutations.raw(weights.read_bytes()),
    )
    index = inputs / "tuned1" / "model.safetensors.index.json"
    names = [name for name in header if name != "__metadata__"]
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    index.write_text(json.dumps(content))
    shard = sorted((inputs / "flex" / "shards").iterdir())[0]
    models = [inputs / f"tuned{number}" for number in (0, 2)]
    nan = config("nan_ties", models, inputs / "base", {"density": 0.5, "scale": 1.0})
    nan["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}
    flex = config("flexmerge", models, inputs / "base", {"target_size": 1.0, "lambda": 1.5})
    peft = config("ties", [inputs / "adapter0", inputs / "adapter1"], None, {"density": 0.5})
    peft |= {"rank": 2, "seed": 1, "dtype": "float32", "modules_to_save": "average"}
    part = Part("w", (2,), 0, (torch.float32,) * 2, torch.float32)
    blocks = tuple(BlockLayout(name, "x", None, (part,)) for name in ("x", "y"))
    layout = Layout(("a", "b"), blocks, ((), ()))
    analysis = inputs / "analysis" / analysis_file.FILE_NAME
    made = _file(analysis, json.dumps(_analysis(layout)))
    journal = inputs / "journal" / "journal-1-0.lines"
    _file(journal, 3 * _line(b'["tensor","a",{"crc":1}]').decode())
    return {
        "safetensors": Reader(weights, heads, _weights),
        "index": _json(index, lambda path: read_folder(path.parent)),
        "config.json": _json(inputs / "tuned0" / "config.json", lambda path: _check(nan)),
        "manifest": _json(inputs / "flex" / "flexmerge.json", _checkpoint),
        "shard": Reader(
            shard,
            mutations.values(split(shard.read_bytes())[0]).map(
                lambda value: joined(value, split(_sound[shard])[1])
            ),
            lambda path: _checkpoint(path.parents[1] / "flexmerge.json"),
        ),
        "adapters' manifest": _json(
            inputs / "tasks" / "flexmerge.json", lambda path: open_manifest(path.parent)
        ),
        "adapter config": _json(inputs / "adapter0" / "adapter_config.json", _adapter),
        "YAML, check": _yaml(inputs / "nan.yml", nan, lambda path: _check(path.read_text())),
        "YAML, merge": _yaml(inputs / "merge.yml", nan, lambda path: parsed(path.read_text())),
        "YAML, flexmerge": _yaml(inputs / "flex.yml", flex, lambda path: _check(path.read_text())),
        "YAML, peft-merge": _yaml(inputs / "peft.yml", peft, lambda path: check(path, None)),
        "analysis": _json(made, lambda path: analysis_file.find(path.parent, _SUBJECT, layout)),
        "journal": Reader(
            journal,
            st.one_of(
                mutations.raw(journal.read_bytes()),
                mutations.documents(["tensor", "a", {"crc": 1}]).map(_line),
            ),
            lambda path: Journal(path.parent),
        ),
    }


_sound: dict[Path, bytes] = {}


def _line(content: bytes) -> bytes:
    """A line of a journal."""
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _file(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def _json(path: Path, read: Callable[[Path], object]) -> Reader:
    content = path.read_bytes()
    inputs = st.one_of(mutations.documents(json.loads(content)), mutations.raw(content))
    return Reader(path, inputs, read)


def _yaml(path: Path, document: Any, read: Callable[[Path], object]) -> Reader:
    content = _file(path, yaml.safe_dump(document)).read_bytes()
    inputs = st.one_of(mutations.documents(document), mutations.raw(content))

    def readable(path: Path) -> object:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the commands' own reading of the file, which tests try
            return None
        return read(path)

    return Reader(path, inputs, readable)


def _weights(path: Path) -> None:
    """What the project takes, the library that reads the values takes, too."""
    headers = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(headers)


def _check(source: Any) -> None:
    text = source if isinstance(source, str) else yaml.safe_dump(source)
    for _, report in check_source(text, MergeOptions()):
        require(report.problems, "this configuration")


def _checkpoint(path: Path) -> None:
    checkpoint = open_checkpoint(path.parent)
    for task in checkpoint.tasks:
        for tensor in checkpoint.tensors(task).values():
            assert isinstance(tensor, torch.Tensor)


def _adapter(path: Path) -> None:
    adapter = load_adapter(path.parent)
    for module in adapter.infos:
        adapter.load(module)


def _analysis(layout: Layout) -> dict[str, Any]:
    return {
        "format": "flexmerge-analysis",
        "version": analysis_file.VERSION,
        "subject": _SUBJECT,
        "tasks": list(layout.tasks),
        "grams": {block.name: [[1.0, 0.5], [0.5, 2.0]] for block in layout.blocks},
        "cuts": [{"densities": [0.2, 0.3], "patterns": [5, 7]}],
    }


def fuzz(reader: Reader, seconds: float) -> Tally:
    """Try inputs for so long."""
    tally = Tally()
    sound = _sound.setdefault(reader.file, reader.file.read_bytes())
    end = time.monotonic() + seconds
    number = int.from_bytes(os.urandom(4), "little")
    while time.monotonic() < end:
        _round(reader, tally, number, end)
        number += 1
    reader.file.write_bytes(sound)
    return tally


def _round(reader: Reader, tally: Tally, number: int, end: float) -> None:
    last: dict[str, Any] = {}

    @seed(number)
    @settings(
        max_examples=_ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    @given(reader.inputs)
    def attempt(content: bytes) -> None:
        if time.monotonic() > end + _SECONDS:
            return
        tally.tried += 1
        reader.file.write_bytes(content)
        signal.alarm(_SECONDS)
        try:
            reader.read(reader.file)
        except MergekitExtError as error:
            tally.refused += 1
            # A message must be one that can be printed.
            str(error).encode("utf-8")
        except Exception as error:
            # Only what is new is a failure, and made smaller.
            place = _place(error)
            if place not in tally.failures and last.setdefault("place", place) == place:
                last.update(content=content, text=traceback.format_exc())
                raise
        finally:
            signal.alarm(0)

    try:
        attempt()
    except Exception:
        if not last:
            raise
        # The last that failed is the smallest.
        tally.failures[last["place"]] = (last["content"], last["text"])


def _place(error: Exception) -> str:
    """Kind and line: one failure is not reported a thousand times."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def _late(*_: object) -> None:
    raise TimeoutError(f"more than {_SECONDS} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all readers together")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="a folder")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    folder = Path(tempfile.mkdtemp())
    print(machine.describe(), flush=True)
    failed = 0
    try:
        made = readers(folder)
        chosen = {arguments.reader: made[arguments.reader]} if arguments.reader else made
        print("\n| reader | inputs | refused | failures |\n| --- | --: | --: | --: |")
        for name, reader in chosen.items():
            tally = fuzz(reader, 60 * arguments.minutes / len(chosen))
            count = len(tally.failures)
            print(f"| {name} | {tally.tried:,} | {tally.refused:,} | {count} |", flush=True)
            for place, (content, text) in tally.failures.items():
                failed += 1
                arguments.failures.mkdir(exist_ok=True)
                file = arguments.failures / f"{name.replace(' ', '-')}-{failed}"
                file.write_bytes(content)
                print(f"\n{place}; the input is {file}:\n{content[:400]!r}\n{text}", flush=True)
    finally:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
