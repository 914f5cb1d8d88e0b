"""`merge`, `decompose` and `check` of `mergekit_ext`, and what they return."""

import functools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from mergekit.options import MergeOptions
from safetensors.torch import load_file

import mergekit_ext
from mergekit_ext import parallel
from mergekit_ext.core.memory import limited, size
from mergekit_ext.errors import Problem, numbered, printable
from mergekit_ext.flexmerge.manifest import SHARDS
from mergekit_ext.flexmerge.reader import open_checkpoint
from mergekit_ext.flexmerge.runtime import build_module, load
from mergekit_ext.host import run
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.host.checks.report import CheckReport
from mergekit_ext.host.commands import require_decomposition, source_of
from mergekit_ext.io.documents import StrPath
from mergekit_ext.io.headers import allowing_pickles
from mergekit_ext.io.hub import Pushable, in_folder
from mergekit_ext.report.card import REPORT_NAME
from peft_merge.io.read import CONFIG

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class MergeResult(Pushable):
    """The folder `path` of a merge, read when asked for; one without a name goes with the result.

    Attributes:
        report: merge_report.json.
        card: the model card, README.md.
        tensors: by name, mapped into memory, where they stay when the folder goes; of several
            models by task (or folder), then by name.
        url: of the repository on the Hub to which it was uploaded.
    """

    path: Path

    @cached_property
    def report(self) -> Any:
        return json.loads((self.path / REPORT_NAME).read_text(encoding="utf-8"))

    @cached_property
    def card(self) -> str:
        return (self.path / "README.md").read_text(encoding="utf-8")

    @cached_property
    def tensors(self) -> dict[str, Any]:
        if (self.path / SHARDS).is_dir():
            checkpoint = open_checkpoint(self.path)
            return {task: checkpoint.tensors(task) for task in checkpoint.tasks}
        found: dict[str, dict[str, Any]] = {}
        for file in sorted((*self.path.glob("*.safetensors"), *self.path.glob("*/*.safetensors"))):
            found.setdefault(file.parent.name, {}).update(load_file(file))
        return found.get(self.path.name, found)

    def load(self, **options: Any) -> Any:
        """Return the transformers module in evaluation mode; of a FlexMerge those of all tasks.

        `options` are those of `mergekit_ext.load`; of one model `dtype` and `trust_remote_code`.
        """
        if (self.path / SHARDS).is_dir():
            return load(self.path, **options)
        return build_module(self.path, self.tensors, **options)

    def _named(self, name: str) -> AbstractContextManager[Path]:
        return in_folder(partial(_on_hub, self.path, name))


def _on_hub(folder: Path, name: str, copy: Path) -> None:
    """Link a folder as `copy`; adapters of `decompose` name the repository of their base."""
    shutil.copytree(folder.absolute(), copy, copy_function=os.symlink)
    for path in copy.glob(f"*/{CONFIG}"):
        stated = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()  # the link
        stated["base_model_name_or_path"] = name
        path.write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


class Checked(NamedTuple):
    """What `check` has found: the `name:` and the report of each merge; as text, all of it."""

    documents: tuple[tuple[str | None, CheckReport], ...]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with any of the merges; none if all can start."""
        return tuple(problem for _, report in self.documents for problem in report.problems)

    def __str__(self) -> str:
        return "\n\n".join(_as_text(name, report) for name, report in self.documents)


def _as_text(name: str | None, report: CheckReport) -> str:
    lines = [f"{printable(name)}:"] if name is not None else []
    count = len(report.problems)
    if count:
        lines.append(f"{count} problem{'s' if count != 1 else ''}:")
        lines += numbered(report.problems)
    else:
        lines.append("No problems.")
    if cost := report.estimate:
        about, most = ("", "") if cost.planned else ("about ", " at most")
        lines += [
            f"Output:        {about}{cost.tensors:,} tensors, {cost.parameters:,} parameters",
            f"Bytes read:    {size(cost.bytes_read)}",
            f"Bytes written: {size(cost.bytes_written)}{most}",
            f"Bytes held:    {size(cost.bytes_held)} at most, estimated",
            *([f"Time:          {cost.time}"] if cost.time else []),
        ]
    if report.notes:
        lines.append("Notes:")
        lines += [f"  - {printable(note)}" for note in report.notes]
    return "\n".join(lines)


def interface(function: _Function) -> _Function:
    """Have the methods known, and `max_memory` and `allow_pickle` in force, during a call."""

    @functools.wraps(function)
    def run(*given: Any, max_memory: Any = None, allow_pickle: bool = False, **more: Any) -> Any:
        mergekit_ext.register()
        with limited(max_memory, "max_memory"), allowing_pickles(allow_pickle):
            return function(*given, **more)

    return cast("_Function", run)


@interface
def merge(
    config: Any,
    out: StrPath | None = None,
    options: MergeOptions | None = None,
    *,
    callbacks: Iterable[object] = (),
    restart: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    keep_solution: StrPath | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> MergeResult:
    """Merge as ``mergekit-yaml`` does, with any method, checked first and with callbacks.

    Args:
        config: a path, YAML text of more than one line, a mapping, or a ``MergeConfiguration``.
        out: folder of the result, which appears when it is complete; by default a temporary one.
        options: a ``mergekit.options.MergeOptions``; by default mergekit's defaults.
        callbacks: objects with methods of `mergekit_ext.events.MergeCallback`, beside the
            progress bar, which `options.quiet` switches off.
        restart: start over where an earlier merge into `out` was stopped, instead of going on.
        push_to_hub, private: upload the output to this repository, as `MergeResult.push_to_hub`;
            name and access are checked before the merge.
        keep_solution: a folder that keeps what `lore` solves for, so that merges with another
            `lambda`, `combine` or `weight` need not solve it again.
        max_memory: bytes, or text such as "8GB", that the process and each GPU may hold; a merge
            that needs more is refused.
        allow_pickle: also read pickles (pytorch_model.bin) of people you trust.

    Returns:
        A `MergeResult`: `path`, `report`, `card`, `tensors`, and `load()`, a transformers module.

    Raises:
        ConfigError: with all that is wrong; only configurations and headers were read.
        NonFiniteError: an input holds NaN or infinity; nothing was written.
        UploadError: the upload stopped; the output stands.
        StoppedError: a full disk, an input that is gone, no memory; what is finished is kept.
        TypeError: a callback is a class, or has none of those methods; nothing was written.

    Example:
        >>> result = mergekit_ext.merge("merge.yml", "merged")
        >>> model = mergekit_ext.merge({"merge_method": "linear", "models": [...]}).load()
    """
    scratch = tempfile.mkdtemp(prefix="mergekit-ext-") if out is None else ""
    place = Path(os.path.expanduser(out or f"{scratch}/merged"))
    result = MergeResult(place)
    if scratch:
        weakref.finalize(result, shutil.rmtree, scratch, ignore_errors=True)
    given: Any = {"callbacks": callbacks, "restart": restart, "keep_solution": keep_solution}
    run.merge(config, place, options, push_to_hub=push_to_hub, private=private, **given)
    if push_to_hub is not None and parallel.current().is_main:
        result.push_to_hub(push_to_hub, private=private)
    return result


def decompose(config: Any, out: StrPath | None = None, *options: Any, **more: Any) -> MergeResult:
    """Make one base of fine-tunes, and a LoRA of each (``merge_method: decompose``).

    Arguments and errors are those of `merge`; another merge is an error. `out` gets the folder
    `base`, an ordinary model, and a PEFT adapter for each task.

    Example:
        >>> mergekit_ext.decompose("decompose.yml", "out").path / "base"
    """
    require_decomposition(source_of(config))
    return merge(config, out, *options, **more)


@interface
def check(
    config: Any,
    options: MergeOptions | None = None,
    *,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Checked:
    """Check a merge, or several for ``mergekit-multi``, without reading any weight.

    Args:
        config: as for `merge`.
        options: those that the merge will get.
        max_memory, allow_pickle: as for `merge`.

    Returns:
        A `Checked`: `problems`, and for each merge in `documents` its name and its report, with
        `problems`, `notes` and an `estimate` of bytes; as text, what ``mergekit-ext check`` prints.

    Raises:
        ConfigError: there is no such file, or `config` is none of these.

    Example:
        >>> found = mergekit_ext.check("merge.yml")
        >>> print(found)
    """
    return Checked(tuple(check_source(source_of(config), options or MergeOptions())))
