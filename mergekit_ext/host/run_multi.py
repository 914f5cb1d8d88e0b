"""``mergekit-multi``: documents that are no merges, or whose results would land elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_ext.core.wording import shown
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.host import compat
from mergekit_ext.host.checks.schema import parse, unknown_keys
from mergekit_ext.host.checks.source import between_documents
from mergekit_ext.host.methods import is_stock
from mergekit_ext.host.run import for_commands
from mergekit_ext.io.documents import DocumentError, read


def checked_load_config(load_config: Callable[..., Any]) -> Callable[..., Any]:
    """``load_config`` after `check`, for those who call it without the command."""

    @compat.replaces(load_config)
    def load(config_source: str, intermediate_dir: str) -> Any:
        with for_commands():
            check(config_source)
            return load.stock(config_source, intermediate_dir)  # type: ignore[attr-defined]

    return load


def check(text: str) -> None:
    """Raise `ConfigError` for a text that is no multi-merge.

    Where all methods are mergekit's, only what its schema refuses is.
    """
    try:
        documents, _ = read(text)
    except DocumentError as error:
        raise ConfigError([error.problem], "these merges") from None
    problems = list(_no_mappings(documents)) or list(_problems(documents))
    if problems:
        raise ConfigError(problems, "these merges")


def _no_mappings(documents: list[Any]) -> Iterator[Problem]:
    expected = "a mapping with `merge_method:` and inputs"
    if not documents:
        yield Problem("the file", "no document", expected)
    for i, document in enumerate(documents):
        if not isinstance(document, Mapping):
            yield Problem(f"document {i + 1}", shown(document), expected)


def _problems(documents: list[dict[str, Any]]) -> Iterator[Problem]:
    # An unknown name is probably one of ours, misspelt.
    ours = [not is_stock(str(document.get("merge_method"))) for document in documents]
    between = between_documents(documents) if any(ours) else {}
    for i, document in enumerate(documents):
        place = f"document {i + 1}: " if len(documents) > 1 else ""
        found = parse(document, MergeConfiguration)[1]
        if ours[i] or found:
            found += unknown_keys(document)
        for p in (*between.get(i, ()), *found):
            yield Problem(place + p.where, p.found, p.expected, p.remedy)
