"""``mergekit-ext analyze CONFIG OUT``: how alike the models are, and what each size would merge."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_ext.core.memory import limited
from mergekit_ext.host.commands import for_commands
from mergekit_ext.io.headers import allowing_pickles


@click.command("analyze", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False))
@click.argument("out_path", type=click.Path(file_okay=False))
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw similarity.png")
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin of people you trust")
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB")
@add_merge_options  # type: ignore[untyped-decorator]
def analyze(
    merge_options: MergeOptions,
    config_file: str,
    out_path: str,
    plot: bool,
    max_memory: str | None,
    allow_pickle: bool,
) -> None:
    """Measure the models of a `flexmerge` configuration, and merge nothing.

    Prints the similarity of the task vectors in every block, and the size after each merge. Writes
    the analysis (which merges into this folder or beside it use again), similarity.csv, steps.csv
    and similarity.png into the folder OUT_PATH. The `target_size` in CONFIG_FILE is not used.
    """
    from mergekit_ext.host.flexmerge.analyze import analyze as run

    merge_options.apply_global_options()
    with for_commands(), limited(max_memory), allowing_pickles(allow_pickle):
        click.echo(run(Path(config_file), Path(out_path), merge_options, plot=plot))
