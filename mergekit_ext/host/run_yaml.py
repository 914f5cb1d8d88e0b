"""Commands that read a YAML: a file that is no merge is one message, not a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_ext.documents import DocumentError, read, text_of
from mergekit_ext.errors import ConfigError
from mergekit_ext.host import compat
from mergekit_ext.host.methods import ext_method
from mergekit_ext.host.run import for_commands, parsed
from mergekit_ext.interrupts import prompt


def extended_command(
    callback: Callable[..., Any], check: Callable[[str], None]
) -> Callable[..., Any]:
    """The callback of a command, after a look at the text of its file.

    mergekit parses the file before any function of ours is called. Here it stops, before a folder
    is made, if `check` raises `ConfigError`.
    """

    @compat.replaces(callback)
    def command(config_file: str, **arguments: Any) -> None:
        stock = command.stock  # type: ignore[attr-defined]
        with for_commands():
            check(text_of(Path(config_file)))
        with prompt():
            stock(config_file=config_file, **arguments)

    return command


def check(text: str) -> None:
    """Raise `ConfigError` for a text that cannot be read safely, whatever its method.

    The schema is the project's business for its own methods.
    """
    try:
        documents, _ = read(text)
    except DocumentError as error:
        raise ConfigError([error.problem], "this configuration") from None
    first = documents[0] if documents else None
    name = first.get("merge_method") if isinstance(first, dict) else None
    if ext_method(str(name)) is not None:
        parsed(text, MergeOptions())
