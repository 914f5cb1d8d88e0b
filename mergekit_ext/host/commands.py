"""mergekit's commands: the text of a configuration is checked first, and an error is a message."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from mergekit.config import MergeConfiguration

from mergekit_ext.core.interrupts import prompt
from mergekit_ext.errors import (
    ConfigError,
    FileError,
    MergekitExtError,
    MergeWarning,
    Problem,
    printable,
    shown,
)
from mergekit_ext.host.checks.schema import (
    NO_DOCUMENT,
    between_documents,
    parse,
    unknown_keys,
)
from mergekit_ext.host.method import is_stock
from mergekit_ext.io.documents import read, text_of
from mergekit_ext.parallel import require_one

_LONGEST_WARNING = 10_000


class CommandError(click.ClickException):
    """An error that a command prints in place of a traceback."""

    exit_code = 2


def reading(check: Callable[[str], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a command look at the text of its file first.

    mergekit parses the file before any function of the project is called. With this the command
    stops before a folder is made if `check` raises `ConfigError`.
    """

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        def command(config_file: str, **arguments: Any) -> None:
            with for_commands():
                check(text_of(Path(config_file)))
            with prompt():
                stock(config_file=config_file, **arguments)

        return command

    return wrap


def load_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``load_config`` of mergekit-multi after `require_merges`, for calls from Python."""

    def load(config_source: str, intermediate_dir: str) -> Any:
        with for_commands():
            require_merges(config_source)
            return stock(config_source, intermediate_dir)

    return load


def parsed(source: str, schema: Any = MergeConfiguration) -> Any:
    """Return what `schema`, mergekit's for whole models, makes of a YAML text.

    Raises:
        ConfigError: it is none, with every reason in the words of the text.
    """
    try:
        documents, repeated = read(source)
    except FileError as error:
        raise ConfigError([error.problem], "this configuration") from None
    if len(documents) > 1:
        found, expected = f"{len(documents)} documents", "one merge"
        remedy = "Use mergekit-multi for several."
        raise ConfigError([Problem("the file", found, expected, remedy)], "this configuration")
    if not documents:
        raise ConfigError([NO_DOCUMENT], "this configuration")
    config, problems = parse(documents[0], schema)
    if config is None:
        raise ConfigError([*repeated, *problems], "this configuration")
    return config


def require_merges(text: str) -> None:
    """Raise `ConfigError` for a text that is no multi-merge.

    Where all methods are mergekit's, only what its schema refuses is.
    """
    try:
        documents, _ = read(text)
    except FileError as error:
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
        config, found = parse(document)
        if ours[i] and config is not None:
            found = unknown_keys(document)
        for p in (*between.get(i, ()), *found):
            yield Problem(place + p.where, p.found, p.expected, p.remedy)


@contextmanager
def for_commands(*, shared: bool = False) -> Iterator[None]:
    """Inside a command, an error of ours is a message and exit code 2, not a traceback.

    Several processes are refused unless the command's work is `shared` by them.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        yield
        return
    shown = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **options: Any) -> None:
        if issubclass(category, MergeWarning):
            click.echo(f"Warning: {printable(str(message), _LONGEST_WARNING)}", err=True)
        else:
            shown(message, category, *rest, **options)

    warnings.showwarning = show
    try:
        if not shared and not require_one(context.command_path):
            raise click.exceptions.Exit(0)
        with prompt():
            yield
    except MergekitExtError as error:
        raise CommandError(str(error)) from None
    finally:
        sys.stderr.flush()
        warnings.showwarning = shown
