"""mergekit's commands: the text of a configuration is checked first, and an error is a message."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from mergekit.config import MergeConfiguration

from mergekit_ext.core.interrupts import prompt
from mergekit_ext.errors import ConfigError, MergekitExtError, MergeWarning, Problem, printable
from mergekit_ext.host.checks.schema import NO_DOCUMENT, between_documents, parse, unknown_keys
from mergekit_ext.host.method import is_stock
from mergekit_ext.io.documents import read, text_of
from mergekit_ext.parallel import require_one

_LONGEST_WARNING = 10_000


class CommandError(click.ClickException):
    """An error that a command prints in place of a traceback."""

    exit_code = 2


def reading_first(check: Callable[[str], Any]) -> Callable[..., None]:
    """Return what makes a command look at the text of its file first.

    mergekit parses the file before any function of the project is called. With this the command
    stops before a folder is made if `check` raises `ConfigError`.
    """

    def command(stock: Callable[..., None], config_file: str, **arguments: Any) -> None:
        with for_commands():
            check(text_of(Path(config_file)))
        with prompt():
            stock(config_file=config_file, **arguments)

    return command


def load_config(stock: Callable[..., Any], config_source: str, intermediate_dir: str) -> Any:
    """Extend ``load_config`` of mergekit-multi: `require_merges` first, for calls from Python."""
    with for_commands():
        require_merges(config_source)
        return stock(config_source, intermediate_dir)


def parsed(source: str, schema: Any = MergeConfiguration) -> Any:
    """Return what `schema`, mergekit's for whole models, makes of a YAML text.

    Raises:
        ConfigError: it is none, with every reason in the words of the text.
    """
    config = None
    documents, problems = read(source)
    if len(documents) == 1:
        config, wrong = parse(documents[0], schema)
        problems = [*problems, *wrong]
    elif documents:
        found, remedy = f"{len(documents)} documents", "Use mergekit-multi for several."
        problems = [Problem("the file", found, "one merge", remedy)]
    else:
        problems = [NO_DOCUMENT]
    if config is None:
        raise ConfigError(problems, "this configuration")
    return config


def require_merges(text: str) -> None:
    """Raise `ConfigError` for a text that is no multi-merge.

    Where all methods are mergekit's, only what its schema refuses is.
    """
    if problems := list(_problems(read(text)[0])):
        raise ConfigError(problems, "these merges")


def _problems(documents: list[Any]) -> Iterator[Problem]:
    if not documents:
        yield NO_DOCUMENT
    # An unknown name is probably one of ours, misspelt.
    ours = [isinstance(d, Mapping) and not is_stock(str(d.get("merge_method"))) for d in documents]
    between = between_documents(documents) if any(ours) else {}
    for i, document in enumerate(documents):
        place = f"document {i + 1}: " if len(documents) > 1 else ""
        config, found = parse(document)
        if ours[i] and config is not None:
            found = unknown_keys(document)
        for p in (*between.get(i, ()), *found):
            yield replace(p, where=place + p.where)


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
