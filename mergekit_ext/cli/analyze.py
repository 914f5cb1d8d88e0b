"""``mergekit-ext analyze CONFIG OUT``: how alike the models are, and what each size would merge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_ext.core.memory import limited
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.storage import Size, Target
from mergekit_ext.host.commands import for_commands
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.prepare import prepare_tables
from mergekit_ext.host.flexmerge.sources import open_inputs
from mergekit_ext.host.session import listening
from mergekit_ext.io.headers import allowing_pickles
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.report.tables import (
    plot_similarity,
    similarity_table,
    steps_table,
    write_rows,
)


@click.command("analyze", cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw similarity.png")
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin of people you trust")
@click.option("--max-memory", metavar="SIZE", help="Refuse what would hold more, such as 8GB")
@add_merge_options  # type: ignore[untyped-decorator]
def analyze(
    merge_options: MergeOptions,
    config_file: Path,
    out_path: Path,
    plot: bool,
    max_memory: str | None,
    allow_pickle: bool,
) -> None:
    """Measure the models of a `flexmerge` configuration, and merge nothing.

    Prints the similarity of the task vectors in every block, and the size after each merge. Writes
    the analysis (which merges into this folder or beside it use again), similarity.csv, steps.csv
    and similarity.png into the folder OUT_PATH. The `target_size` in CONFIG_FILE is not used.
    """
    merge_options.apply_global_options()
    with for_commands(), limited(max_memory), allowing_pickles(allow_pickle):
        click.echo(_analysed(config_file, out_path, merge_options, plot))


def _analysed(config_file: Path, folder: Path, options: MergeOptions, plot: bool) -> str:
    """Measure, write the files into `folder`, and return what to print."""
    ((report, prepared),) = prepare_tables(config_file, folder, options).values()
    folder.mkdir(parents=True, exist_ok=True)
    with listening(options, (), os.fspath(folder)) as session:
        engine = Engine(prepared, open_inputs(prepared), folder, session)
        engine.save_analysis(folder)
        blocks, steps = list(_similarities(engine)), list(_steps(engine))
    write_rows(folder / "similarity.csv", blocks)
    write_rows(folder / "steps.csv", steps)
    notes = list(report.notes)
    if plot:
        try:
            plot_similarity(folder / "similarity.png", blocks, steps)
        except ImportError as error:
            # One of an earlier run would not belong to the tables.
            (folder / "similarity.png").unlink(missing_ok=True)
            notes.append(f"No plot: {error}.")
    return "\n\n".join(["\n".join(notes), similarity_table(blocks), steps_table(steps)])


def _similarities(engine: Engine) -> Iterator[dict[str, Any]]:
    tasks = engine.inputs.layout.tasks
    for block, gram in zip(engine.inputs.layout.blocks, engine.grams, strict=True):
        found = cosines(gram)
        pairs = [float(found[i, j]) for i in range(len(found)) for j in range(i)]
        norms = engine.analysis.grams[block.name].diagonal().sqrt().tolist()
        yield {
            "block": block.name,
            "kind": block.kind,
            "depth": block.depth,
            "elements": block.size,
            "lowest": min(pairs),
            "mean": sum(pairs) / len(pairs),
            "highest": max(pairs),
            **{f"norm/{task}": norm for task, norm in zip(tasks, norms, strict=True)},
        }


def _steps(engine: Engine) -> Iterator[dict[str, Any]]:
    planner, layout = engine.planner, engine.inputs.layout
    if not isinstance(planner, Dendrograms):
        for number, clusters in enumerate(planner.sizes):
            yield _step(number, planner.plan(Target(models=clusters)).size)
        return
    first, *others = planner.trajectory
    yield _step(0, first)
    merges = [iter(sequence) for sequence in planner.order.sequences]
    for number, (index, size) in enumerate(zip(planner.order.steps, others, strict=True), 1):
        merge = next(merges[index])
        groups = " + ".join(
            ", ".join(layout.tasks[task] for task in group) for group in (merge.first, merge.second)
        )
        yield _step(number, size, merge.similarity, layout.blocks[index].name, groups)


def _step(
    number: int, size: Size, similarity: float | None = None, block: str = "", groups: str = ""
) -> dict[str, Any]:
    found = {"merges": number, "models": size.models, "bytes": size.bytes}
    return {**found, "similarity": similarity, "block": block, "groups": groups}
