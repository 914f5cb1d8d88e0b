"""``mergekit-ext analyze CONFIG OUT``: how alike the models are, and what each size would merge."""

from pathlib import Path
from typing import Any

import click

import mergekit_ext
from mergekit_ext.cli.options import merging


@merging
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw similarity.png")
def analyze(merge_options: Any, config_file: Path, out_path: Path, plot: bool) -> str:
    """Measure the models of a `flexmerge` configuration, and merge nothing.

    Prints the similarity of the task vectors in every block, and the size after each merge. Writes
    the analysis (which merges into this folder or beside it use again), similarity.csv, steps.csv
    and similarity.png into the folder OUT_PATH. The `target_size` in CONFIG_FILE is not used.
    """
    click.echo(str(mergekit_ext.analyze(config_file, out_path, merge_options, plot=plot)))
    return f"mergekit-ext sizes {config_file} OUT --evaluate MODULE:FUNCTION"
