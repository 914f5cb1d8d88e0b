"""YAML text of any kind that mergekit's commands take, checked document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from mergekit_ext.errors import Problem, shown
from mergekit_ext.host.checks.flat import check_flat
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.checks.report import CheckReport
from mergekit_ext.host.checks.schema import A_MERGE, parse, unknown_keys
from mergekit_ext.io.documents import DocumentError, read

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

NO_DOCUMENT = Problem("the file", "no document", A_MERGE)
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})


def check_source(
    text: str, options: MergeOptions, *, union: bool = False, intersection: bool = False
) -> list[tuple[str | None, CheckReport]]:
    """Check YAML text for mergekit-yaml, mergekit-multi or mergekit-pytorch.

    YAML and schema errors are problems like the others. Returns one report for each document,
    with its `name:`. In a text of several documents a model may be the name of another document.

    Args:
        text: the configuration.
        options: mergekit's options, for the flags that change what is allowed.
        union, intersection: mergekit-pytorch's flags, see `check_flat`.
    """
    try:
        documents, repeated = read(text)
    except DocumentError as error:
        return [(None, CheckReport((error.problem,), (), None))]
    if not documents:
        return [(None, CheckReport((NO_DOCUMENT,), (), None))]
    names = [_name_of(document) for document in documents]
    between = between_documents(documents)
    reports = []
    for i, (name, document) in enumerate(zip(names, documents, strict=True)):
        pending = {other for other in names if other is not None and other != name}
        report = _check_document(document, options, union, intersection, pending)
        # Keys that stand twice are located in the text, not in a document.
        problems = (*(repeated if i == 0 else ()), *between.get(i, ()), *report.problems)
        reports.append((name, CheckReport(problems, report.notes, report.estimate)))
    return reports


def _check_document(
    document: Any, options: Any, union: bool, intersection: bool, pending: set[str]
) -> CheckReport:
    from mergekit.config import MergeConfiguration
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

    flat = _is_flat(document)
    schema = RawPyTorchMergeConfig if flat else MergeConfiguration
    config, problems = parse(document, schema)
    if config is None:
        return CheckReport((*problems, *unknown_keys(document, schema=schema)), (), None)
    if flat:
        return check_flat(config, options, union=union, intersection=intersection, source=document)
    return check_merge(config, options, document, pending=pending)


def _is_flat(document: Any) -> bool:
    """Whether a document is meant for mergekit-pytorch: its models are files of weights."""
    models = document.get("models") if isinstance(document, Mapping) else None
    paths = [
        item["model"]
        for item in (models if isinstance(models, list) else ())
        if isinstance(item, Mapping) and isinstance(item.get("model"), str)
    ]
    files = [part for path in paths for part in (path, path.partition("+")[0])]
    return any(PurePath(file).suffix in _WEIGHT_SUFFIXES for file in files)


def between_documents(documents: Sequence[Any]) -> dict[int, list[Problem]]:
    """Check the names of a multi-merge's documents, and references from one to another.

    Returns the problems of each document, by its index.
    """
    problems: dict[int, list[Problem]] = {}
    names = [_name_of(document) for document in documents]
    seen: set[str | None] = set()
    for i, (document, name) in enumerate(zip(documents, names, strict=True)):
        written = document.get("name") if isinstance(document, Mapping) else None
        if name is None and written is not None:
            expected = "a text that can be the name of one folder"
            remedy = "Write letters, digits, `-`, `_` and `.`."
            problems[i] = [Problem("name", shown(written), expected, remedy)]
            continue
        if name in seen:
            found = "a second document without a name" if name is None else f"{name!r} again"
            expected = "a name of its own for every document but the last"
            problems[i] = [Problem("name", found, expected, "Give it another `name:`.")]
        seen.add(name)
    for i in _in_circles(documents, names):
        found = f"{names[i]!r}, which depends on itself"
        expected = "documents that depend on earlier results only"
        remedy = "Take one of the references in the circle out."
        problems.setdefault(i, []).append(Problem("models", found, expected, remedy))
    return problems


def _name_of(document: Any) -> str | None:
    """The name that a document gives itself; None if it is not one step down from a folder."""
    name = document.get("name") if isinstance(document, Mapping) else None
    if not isinstance(name, str) or name in ("", "..") or not name.isprintable():
        return None
    return name if PurePosixPath(name).name == name == PureWindowsPath(name).name else None


def _in_circles(documents: Sequence[Any], names: Sequence[str | None]) -> list[int]:
    known = {name for name in names if name is not None}
    edges = {
        name: _names_used(document, known)
        for name, document in zip(names, documents, strict=True)
        if name is not None
    }
    found = []
    for i, name in enumerate(names):
        reached, new = set[str](), edges.get(name, set()) if name is not None else set()
        while new:
            reached |= new
            new = set[str]().union(*(edges[other] for other in new)) - reached
        if name in reached:
            found.append(i)
    return found


def _names_used(document: Any, names: set[str]) -> set[str]:
    from mergekit.config import MergeConfiguration

    config = parse(document, MergeConfiguration)[0]
    return {model.model.path for model in models_at(config)} & names if config else set()
