"""The command ``mergekit-ext``: one file a subcommand."""

from __future__ import annotations

import importlib
from typing import Any

import click

from mergekit_ext.errors import ConfigError
from mergekit_ext.parallel import require_one

# Loaded when asked for: mergekit takes seconds to import, and `--help` should not.
_COMMANDS = {
    "analyze": ("mergekit_ext.cli.analyze", "Measure how alike the models of a FlexMerge are."),
    "check": ("mergekit_ext.cli.check", "Check a merge without reading a weight."),
    "export": (
        "mergekit_ext.cli.export",
        "Write one task of a FlexMerge checkpoint as an ordinary model.",
    ),
    "merge": ("mergekit_ext.cli.merge", "Merge, as mergekit-yaml does, with the methods known."),
    "sizes": ("mergekit_ext.cli.sizes", "Merge at many sizes, and score each."),
}
_SHARED_OUT = {"merge"}


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        command: Any = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup)
@click.version_option(package_name="mergekit-ext")
@click.pass_context
def main(context: click.Context) -> None:
    """NAN, LoRE-Merging and FlexMerge for mergekit."""
    command = context.invoked_subcommand
    if command in _SHARED_OUT:
        return
    try:
        alone = require_one(f"mergekit-ext {command}")
    except ConfigError as error:
        click.echo(f"Error: {error}", err=True)
        context.exit(2)
    if not alone:
        context.exit()
