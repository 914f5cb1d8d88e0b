"""What mergekit's commands and ours do around a merge: read the file first, print errors."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration

from mergekit_ext.core.commands import prompt, reporting
from mergekit_ext.errors import ConfigError, Problem, require
from mergekit_ext.flexmerge.residual import Residual
from mergekit_ext.host.checks.schema import NO_DOCUMENT, between_documents, parse, unknown_keys
from mergekit_ext.host.flexmerge import DECOMPOSE
from mergekit_ext.host.method import is_stock
from mergekit_ext.io.class_model import without_bars
from mergekit_ext.io.documents import read, text_of
from mergekit_ext.parallel import require_one
from peft_merge.config.document import plain


def reading_first(check: Callable[[str], Any]) -> Callable[..., None]:
    """Return an extension of a command that checks the text of its file first."""

    def command(stock: Callable[..., None], config_file: str, **arguments: Any) -> None:
        with for_commands():
            check(text_of(Path(config_file)))
        with prompt():
            stock(config_file=config_file, **arguments)

    return command


def source_of(config: Any) -> str:
    """Return the YAML text of a path, a text of more than one line, or a configuration."""
    if isinstance(config, MergeConfiguration):
        return str(config.to_yaml())
    if isinstance(config, Mapping):
        with suppress(TypeError):  # of values that YAML does not have
            return str(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
    elif isinstance(config, (str, os.PathLike)):
        text = os.fspath(config)
        return text if "\n" in text else text_of(Path(text).expanduser())
    expected = "a path, YAML text of more than one line, a mapping, or a MergeConfiguration"
    raise ConfigError([Problem("config", f"{type(config).__name__}", expected)])


def parsed(source: str) -> Any:
    """Return what mergekit makes of a YAML text, or raise `ConfigError` with every reason."""
    documents, problems = read(source)
    if not documents:
        problems = [NO_DOCUMENT]
    elif len(documents) > 1:
        found, remedy = f"{len(documents)} documents", "Use mergekit-multi for several."
        problems = [Problem("the file", found, "one merge", remedy)]
    else:
        config, wrong = parse(documents[0])
        if config is not None:
            return config
        problems = [*problems, *wrong]
    raise ConfigError(problems, "this configuration")


def require_decomposition(text: str) -> None:
    """Raise `ConfigError` for a text that is no merge into a base and residuals."""
    config = parsed(text)
    method = config.merge_method
    if method == DECOMPOSE or (config.parameters or {}).get("algorithm") == Residual.name:
        return
    expected = f"`{DECOMPOSE}`, or `flexmerge` with `algorithm: {Residual.name}`"
    remedy = "Use `mergekit-ext merge` for other methods."
    raise ConfigError([Problem("merge_method", repr(method), expected, remedy)])


def require_merges(text: str) -> None:
    """Raise `ConfigError` for a text that is no multi-merge.

    Of one with mergekit's methods alone only what its schema refuses is wrong.
    """
    documents, _ = read(text)
    problems = [] if documents else [NO_DOCUMENT]
    # An unknown name is probably one of ours, misspelt.
    ours = [isinstance(d, Mapping) and not is_stock(str(d.get("merge_method"))) for d in documents]
    between = between_documents(documents) if any(ours) else {}
    for i, document in enumerate(documents):
        place = f"document {i + 1}: " if len(documents) > 1 else ""
        config, found = parse(document)
        if ours[i] and config is not None:
            found = unknown_keys(document)
        problems += [replace(p, where=place + p.where) for p in (*between.get(i, ()), *found)]
    require(problems, "these merges")


@contextmanager
def for_commands(*, shared: bool = False, quiet: bool = False) -> Iterator[Any]:
    """Inside a command, an error of ours is a message and exit code 2, not a traceback.

    Several processes are refused unless the work is `shared` by them. Yield what `reporting` does.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        yield
        return
    with reporting() as done, without_bars(quiet):
        if not shared and not require_one(context.command_path):
            raise click.exceptions.Exit(0)
        yield done
