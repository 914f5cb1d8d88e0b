"""Commands that read a YAML: a file that is no merge is one message, not a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_ext.host import compat
from mergekit_ext.host.run import for_commands
from mergekit_ext.interrupts import prompt
from mergekit_ext.io.documents import text_of


def extended_command(
    callback: Callable[..., Any], check: Callable[[str], Any]
) -> Callable[..., Any]:
    """Return the callback of a command, after a look at the text of its file.

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
