"""``mergekit-ext --help``: every subcommand is listed, and describes itself."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from mergekit_ext.cli import main
from peft_merge.cli import main as adapters
from tests.cli import subcommand

STARTS = {
    "analyze": "Measure the models of a `flexmerge`",
    "check": "Check the merge that CONFIG describes",
    "export": "Write one TASK of the FlexMerge",
    "merge": "Merge models as CONFIG_FILE says",
    "sizes": "Merge a `flexmerge` configuration at many",
}


@pytest.mark.parametrize("name", STARTS)
def test_help(name: str) -> None:
    assert f"  {name} " in CliRunner().invoke(main, ["--help"]).output
    assert STARTS[name] in subcommand(name, "--help").output


@pytest.mark.parametrize("group", [main, adapters])
def test_a_misspelt_command_is_answered_with_the_nearest(group: click.Group) -> None:
    for name in group.list_commands(click.Context(group)):
        for rest in ([], ["a.yml"], ["a.yml", "out"]):
            done = CliRunner().invoke(group, [name[0] + name[2:], *rest])
            assert f"Write `{name}`." in done.output and done.exit_code == 2


def options() -> list[tuple[click.Group, str, str]]:
    """Every option with one value, of every command."""
    found = []
    for group in (main, adapters):
        context = click.Context(group)
        for name in group.list_commands(context):
            for option in group.get_command(context, name).params:
                single = isinstance(option, click.Option) and not option.multiple
                if single and not (option.is_flag or option.count):
                    found.append((group, name, option.opts[0]))
    return found


def test_an_option_with_one_value_is_given_once() -> None:
    assert len(options()) > 40
    for group, name, option in options():
        done = CliRunner().invoke(group, [name, option, "1", option, "2"])
        assert (done.exit_code, f"{option}: given 2 times" in done.output) == (2, True), option
