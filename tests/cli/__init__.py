"""What the tests of subcommands share."""

from __future__ import annotations

from click.testing import CliRunner, Result

from mergekit_ext.cli import main


def subcommand(name: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, [name, *map(str, arguments)])


def assert_refused(result: Result, message: str) -> None:
    """One message, the exit code of a wrong input, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr and "Traceback" not in result.stderr
