"""``mergekit-ext tune CONFIG OUT``: a search for the values that a configuration leaves open."""

from pathlib import Path
from typing import Any

import click

import mergekit_ext
from mergekit_ext.cli.options import merging
from mergekit_ext.core.commands import searching
from mergekit_ext.search import function_named


@merging
@searching
def tune(merge_options: Any, config_file: Path, out_path: Path, evaluate: str, **given: Any) -> str:
    """Search for the values that CONFIG_FILE leaves open, such as `scale: {from: 0.1, to: 2}`.

    FUNCTION gets a module and a task's name, as for `sizes`; the higher the mean over the tasks,
    the better. Writes best.yml, tables, a plot and the study into the folder OUT_PATH. The same
    command goes on with a study that was stopped.
    """
    function = function_named(evaluate, "--evaluate", "a module", "a task")
    found = mergekit_ext.tune(config_file, out_path, function, merge_options, **given)
    click.echo(f"{found.score:.4f}: {out_path / 'best.yml'}")
    return f"mergekit-yaml {out_path / 'best.yml'} OUT"
