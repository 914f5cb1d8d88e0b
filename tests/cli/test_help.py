"""``mergekit-ext --help``: every subcommand is listed, and describes itself."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mergekit_ext.cli import main
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
