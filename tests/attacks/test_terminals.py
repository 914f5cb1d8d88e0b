"""Names of unknown origin on a terminal: no sequence in them moves its cursor or sets its title."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergekit_ext.errors import MergeWarning, NonFiniteError
from tests.models import config, write_yaml

_ESCAPE = "\x1b]0;OWNED\x07\x1b[2J"


def invoked(main: click.Command, *words: object) -> str:
    """What a command prints, as on a terminal: click leaves sequences in."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = CliRunner().invoke(main, [str(word) for word in words], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def clean(text: str) -> None:
    assert "OWNED" in text
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text


def test_the_base_of_an_adapter(inputs: Path, tmp_path: Path) -> None:
    from peft_merge.cli import main

    for index in range(2):
        file = inputs / f"adapter{index}" / "adapter_config.json"
        content = {**json.loads(file.read_text()), "base_model_name_or_path": f"{index}{_ESCAPE}"}
        file.write_text(json.dumps(content))
    where = write_yaml(
        tmp_path / "m.yml", config("linear", [inputs / "adapter0", inputs / "adapter1"])
    )
    clean(invoked(main, where, tmp_path / "out"))


def test_the_name_of_a_document(inputs: Path, tmp_path: Path) -> None:
    from mergekit_ext.cli import main

    file = write_yaml(tmp_path / "m.yml", {"name": _ESCAPE, **config("nan", [inputs / "tuned0"])})
    clean(invoked(main, "check", file))


def test_a_warning() -> None:
    from mergekit_ext.host.commands import for_commands

    @click.command()
    def main() -> None:
        with for_commands():
            warnings.warn(MergeWarning(f"of {_ESCAPE}"), stacklevel=1)

    clean(invoked(main))


@pytest.mark.parametrize("names", [("w", _ESCAPE), (_ESCAPE, "m")], ids=["model", "tensor"])
def test_an_error(names: tuple[str, str]) -> None:
    clean(str(NonFiniteError(*names, 1, 2)))
