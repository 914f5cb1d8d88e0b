"""The command ``mergekit-ext``: one file a subcommand."""

import importlib
from typing import Any

import click

from mergekit_ext.core.commands import Commands

# Loaded when run: mergekit takes seconds to import, and `--help` should not.
_COMMANDS = {
    "analyze": "Measure how alike the models of a FlexMerge are.",
    "check": "Check a merge without reading a weight.",
    "decompose": "Make one base of fine-tunes, and a LoRA of each.",
    "export": "Write one task of a FlexMerge checkpoint as an ordinary model.",
    "merge": "Merge, as mergekit-yaml does, with the methods known.",
    "methods": "Show the merge methods, and when to use which.",
    "sizes": "Merge at many sizes, and score each.",
    "tune": "Search for the best values of a configuration.",
}


class LazyGroup(Commands):
    """A group whose subcommands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        if cmd_name in _COMMANDS:
            return getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="mergekit-ext")
def main() -> None:
    """NAN, LoRE-Merging and FlexMerge for mergekit."""
