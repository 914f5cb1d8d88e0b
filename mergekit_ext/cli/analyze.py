"""``mergekit-ext analyze CONFIG OUT``: how alike the models are, and what each size would merge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_ext.cli.options import merging

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_ext.flexmerge.storage import Size
    from mergekit_ext.host.flexmerge.engine import Engine


@merging
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw similarity.png")
def analyze(merge_options: MergeOptions, config_file: Path, out_path: Path, plot: bool) -> None:
    """Measure the models of a `flexmerge` configuration, and merge nothing.

    Prints the similarity of the task vectors in every block, and the size after each merge. Writes
    the analysis (which merges into this folder or beside it use again), similarity.csv, steps.csv
    and similarity.png into the folder OUT_PATH. The `target_size` in CONFIG_FILE is not used.
    """
    from mergekit_ext.host.flexmerge.engine import Engine, open_inputs
    from mergekit_ext.host.flexmerge.prepare import prepare_tables
    from mergekit_ext.host.session import listening
    from mergekit_ext.report.tables import (
        plot_similarity,
        similarity_table,
        steps_table,
        write_rows,
    )

    ((report, prepared),) = prepare_tables(config_file, out_path, merge_options).values()
    out_path.mkdir(parents=True, exist_ok=True)
    with listening(merge_options, (), os.fspath(out_path)) as session:
        reader, _ = open_inputs(prepared)
        engine = Engine(prepared, reader, out_path, session, out_path)
        engine.save_analysis(out_path)
        blocks, steps = list(_similarities(engine)), list(_steps(engine))
    write_rows(out_path / "similarity.csv", blocks)
    write_rows(out_path / "steps.csv", steps)
    notes = list(report.notes)
    if plot:
        try:
            plot_similarity(out_path / "similarity.png", blocks, steps)
        except ImportError as error:
            # One of an earlier run would not belong to the tables.
            (out_path / "similarity.png").unlink(missing_ok=True)
            notes.append(f"No plot: {error}.")
    click.echo("\n\n".join(["\n".join(notes), similarity_table(blocks), steps_table(steps)]))


def _similarities(engine: Engine) -> Iterator[dict[str, Any]]:
    from mergekit_ext.kernels.similarity import cosines

    tasks = engine.layout.tasks
    for block, gram in zip(engine.layout.blocks, engine.grams, strict=True):
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
    from mergekit_ext.flexmerge.plan import Dendrograms
    from mergekit_ext.flexmerge.storage import Target

    planner, layout = engine.planner, engine.layout
    if not isinstance(planner, Dendrograms):
        for number, clusters in enumerate(planner.sizes):
            yield _step(number, planner.plan(Target(models=clusters)).size)
        return
    first, *others = planner.trajectory
    yield _step(0, first)
    merges = [iter(sequence) for sequence in planner.order.sequences]
    for number, (index, size) in enumerate(zip(planner.order.steps, others, strict=True), 1):
        merge = next(merges[index])
        groups = (", ".join(layout.tasks[t] for t in g) for g in (merge.first, merge.second))
        yield _step(number, size, merge.similarity, layout.blocks[index].name, " + ".join(groups))


def _step(
    number: int, size: Size, similarity: float | None = None, block: str = "", groups: str = ""
) -> dict[str, Any]:
    found = {"merges": number, "models": size.models, "bytes": size.bytes}
    return {**found, "similarity": similarity, "block": block, "groups": groups}
