"""YAML text of any kind that mergekit's commands take, checked document by document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mergekit_ext.errors import Problem
from mergekit_ext.host.checks.flat import check_flat
from mergekit_ext.host.checks.keys import unknown_keys
from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.checks.multi import between_documents, names_of
from mergekit_ext.host.checks.report import CheckReport, Findings
from mergekit_ext.host.checks.schema import parse
from mergekit_ext.io.documents import DocumentError, read

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

NO_DOCUMENT = Problem("the file", "no document", "a merge configuration")
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
    names = names_of(documents)
    between = between_documents(documents)
    reports = []
    for i, (name, document) in enumerate(zip(names, documents, strict=True)):
        pending = {other for other in names if other is not None and other != name}
        report = _check_document(document, options, union, intersection, pending)
        # Keys that stand twice are located in the text, not in a document.
        problems = (*(repeated if i == 0 else ()), *between.get(i, ()), *report.problems)
        reports.append((name, CheckReport(problems, report.notes, report.estimate)))
    return reports


def is_flat(document: Any) -> bool:
    """Whether a document is meant for mergekit-pytorch: its models are weight files."""
    models = document.get("models") if isinstance(document, Mapping) else None
    paths = [
        item["model"]
        for item in (models if isinstance(models, list) else ())
        if isinstance(item, Mapping) and isinstance(item.get("model"), str)
    ]
    files = [part for path in paths for part in (path, path.partition("+")[0])]
    return any(PurePath(file).suffix in _WEIGHT_SUFFIXES for file in files)


def _check_document(
    document: Any, options: Any, union: bool, intersection: bool, pending: set[str]
) -> CheckReport:
    from mergekit.config import MergeConfiguration
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

    flat = is_flat(document)
    schema = RawPyTorchMergeConfig if flat else MergeConfiguration
    config, problems = parse(document, schema)
    if config is None:
        findings = Findings()
        findings.extend(problems)
        if isinstance(document, Mapping):
            findings.extend(unknown_keys(document, schema=schema))
        return findings.report()
    if flat:
        return check_flat(config, options, union=union, intersection=intersection, source=document)
    return check_merge(config, options, document, pending=pending)
