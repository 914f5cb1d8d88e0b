"""What decides an output: a killed merge is continued, and shared, only where it is the same."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath

from mergekit_ext import parallel
from mergekit_ext.errors import MergeError, Problem, require
from mergekit_ext.host.adapters.fitted import VARIABLE as ADAPTERS_VARIABLE
from mergekit_ext.host.inputs import cached_folder, files_of
from mergekit_ext.host.method import ExtMethod, is_stock
from mergekit_ext.io.model_files import may_be_hub_name
from mergekit_ext.io.solution import Solution
from mergekit_ext.parallel import Ranks, own_device

# Options of how a merge runs and is shown, which its result does not depend on.
_NO_EFFECT = {"quiet", "verbosity", "num_threads", "async_write", "write_threads", "lazy_unpickle"}
_PACKAGES = ("mergekit-ext", "mergekit", "torch", "transformers", "tokenizers")
_PROSE = {".md"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
_REMEDY = (
    "Start all processes with the same command and versions. Inputs that were copied to several "
    "machines need the same times of change (rsync -t, cp -p)."
)


def identity(source: str, options: Any, models: Iterable[Any]) -> dict[str, str]:
    """Return what decides the output of a merge that reads `models`, by names for messages.

    Local models are known by the length and the time of change of their files, those of the Hub by
    their commit.
    """
    given = {k: v for k, v in options.model_dump().items() if k not in _NO_EFFECT}
    # Several processes have devices of one kind.
    given["device"] = _kind(str(options.device).partition(":")[0])
    inputs = sorted({(part.path, part.revision or "") for part in parts_of(models)})
    return {
        "configuration": _digest(source),
        "options": _digest(given, os.environ.get(ADAPTERS_VARIABLE, "")),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES),
        **{f"input {path}": _input(path, at, options) for path, at in inputs},
    }


def solution(folder: Any, config: Any, method: Any, decides: dict[str, str]) -> Solution | None:
    """Return what keeps a merge's solution, if a folder is given; added to what `decides` it."""
    if folder is None:
        return None
    where, uses = "--keep-solution", method.declared.solves if isinstance(method, ExtMethod) else ()
    if not uses or config.base_model is not None:
        found, expected = f"it with merge_method: {config.merge_method}", "lore without a base"
        require([Problem(where, found, expected, "Leave it out.")])
    given = json.loads(
        config.model_dump_json(exclude={"out_dtype"}, exclude_none=True),
        object_hook=lambda found: {k: v for k, v in found.items() if k not in uses},
    )
    parts = {name: _digest(value) for name, value in given.items()}
    inputs = {name: text for name, text in decides.items() if name.startswith("input ")}
    kept = Solution(Path(folder).expanduser(), {**parts, **inputs})
    require(list(kept.problems(where)))
    decides["solution"] = "kept"
    return kept


def _kind(device: str) -> str:
    """Return a kind of device with its model, whose rounding a resumed merge must share."""
    named = getattr(getattr(torch, device, None), "get_device_name", None)
    return f"{device} {named()}" if named and torch.accelerator.is_available() else device


def parts_of(models: Iterable[Any]) -> list[ModelPath]:
    """Return models and adapters, each by itself."""
    return [part for model in models for part in (model.model, model.lora) if part is not None]


def weights_of(models: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Return length and time of change of every local file of weights, by its path."""
    folders = map(Path, sorted({part.path for part in parts_of(models)}))
    files = (file for folder in folders if folder.is_dir() for file in files_of(folder))
    return {str(file): _state(file) for file in files if file.suffix in _WEIGHTS}


def require_unchanged(before: Mapping[str, tuple[int, int]]) -> None:
    """Raise `MergeError` if weights were written to since `weights_of` looked at them."""
    there = {path: state for path, state in before.items() if os.path.exists(path)}
    changed = [path for path, state in there.items() if _state(Path(path)) != state]
    if changed:
        raise MergeError(
            f"{', '.join(changed)}: written to while it was merged; the output would be of two "
            "versions. Merge again when no process writes to it."
        )


def _input(path: str, revision: str, options: Any) -> str:
    folder = Path(path)
    if folder.is_dir():
        # Pages about a model may be rewritten while it is merged.
        kept = (f for f in files_of(folder) if f.suffix not in _PROSE)
        files = [(str(f.relative_to(folder)), *_state(f)) for f in kept if f.name[0] != "."]
        return _digest(files)
    if not may_be_hub_name(path):  # of a tokenizer: mergekit reports it
        return ""
    place = ModelPath(path=path, revision=revision or None)
    snapshot = cached_folder(place, options)
    # The folder's name is the commit; where the cache lies is of no effect.
    return _digest(snapshot.name if snapshot is not None else "", revision)


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def process_problems(name: str, options: Any) -> Iterator[Problem]:
    """Yield what keeps several processes from a merge with method `name`; nothing for one."""
    size = parallel.current().size
    if size == 1:
        return
    beside, own = f"in {size} processes", "a GPU of its own each"
    cuda = "Leave it out, and give --cuda: every process takes a GPU of its own."
    if is_stock(name):  # an unknown name is another problem
        found, expected = f"{name}, which is mergekit's own, {beside}", "a method of mergekit-ext"
        remedy = "Merge in one process; --multi-gpu shares the work out over its GPUs."
        yield Problem("merge_method", found, expected, remedy)
    if not options.safe_serialization:
        expected = "safetensors, which several processes can write"
        yield Problem("--no-safe-serialization", f"it {beside}", expected, "Leave it out.")
    if options.multi_gpu:
        yield Problem("--multi-gpu", f"it (perhaps as --gpu-rich) {beside}", "one GPU each", cuda)
    if ":" in options.device:
        yield Problem("--device", f"{options.device} {beside}", own, cuda)


def own_options(options: Any) -> Any:
    """Return mergekit's options as this process has them: its own device, one progress bar."""
    processes = parallel.current()
    if processes.size == 1:
        return options
    quiet = options.quiet or not processes.is_main
    return options.model_copy(update={"device": own_device(options.device), "quiet": quiet})


def require_same(processes: Ranks, given: Mapping[str, str]) -> None:
    """Raise in all `processes` what was given to one and not to the first; each calls this.

    `given` has names that a user understands.
    """
    first, *others = processes.gather(dict(given))
    problems = []
    for rank, found in enumerate(others, 1):
        if names := [n for n in {**first, **found} if found.get(n) != first.get(n)]:
            what = f"another {', '.join(names)}"
            problems.append(Problem(f"rank {rank}", what, "what rank 0 was given", _REMEDY))
    require(problems)
