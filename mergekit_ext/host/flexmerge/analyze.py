"""The analysis of a configuration as tables and plots."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_ext.flexmerge.layout import Layout
from mergekit_ext.flexmerge.options import DEFAULT_ALGORITHM
from mergekit_ext.flexmerge.plan import Dendrograms, Planner
from mergekit_ext.flexmerge.target import Target
from mergekit_ext.host.flexmerge import prepare
from mergekit_ext.host.flexmerge.curve_files import flexmerge_config, require_folder
from mergekit_ext.host.flexmerge.engine import Engine
from mergekit_ext.host.flexmerge.parameters import variant
from mergekit_ext.host.flexmerge.sources import open_inputs
from mergekit_ext.host.session import listening
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.report.similarity import (
    BlockSimilarity,
    Step,
    plot_similarity,
    similarity_table,
    steps_table,
    write_similarity,
    write_steps,
)


def analyze(config_file: Path, folder: Path, options: MergeOptions, *, plot: bool = True) -> str:
    """Measure, write the files into `folder`, and return what to print.

    The configuration's ``target_size`` is not used: an analysis is how to find one.

    Raises:
        ConfigError: something is wrong with the configuration, its inputs or `folder`.
        NonFiniteError: an input holds NaN or infinity.
    """
    config, source = flexmerge_config(config_file)
    algorithm = str((config.parameters or {}).get("algorithm", DEFAULT_ALGORITHM))
    report, prepared = prepare.check(variant(config, algorithm, [algorithm]), options, source)
    report.raise_for_problems("this configuration")
    assert prepared is not None
    require_folder(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with listening(options, (), os.fspath(folder)) as session:
        inputs = open_inputs(prepared, options)
        engine = Engine(prepared, inputs, options, folder, session.emit)
        engine.keep_analysis()
        planner = engine.planner
    blocks = list(_similarities(engine))
    steps = list(_steps(planner, inputs.layout))
    write_similarity(folder / "similarity.csv", blocks, inputs.layout.tasks)
    write_steps(folder / "steps.csv", steps)
    notes = list(report.notes)
    if plot:
        try:
            plot_similarity(folder / "similarity.png", blocks, steps)
        except ImportError as error:
            # One of an earlier run would not belong to the tables.
            (folder / "similarity.png").unlink(missing_ok=True)
            notes.append(f"No plot: {error}.")
    return "\n\n".join(["\n".join(notes), similarity_table(blocks), steps_table(steps)])


def _similarities(engine: Engine) -> Iterator[BlockSimilarity]:
    analysis = engine.analysis
    for block, gram in zip(engine.reader.layout.blocks, engine.grams, strict=True):
        found = cosines(gram)
        count = len(analysis.tasks)
        pairs = [float(found[i, j]) for i in range(count) for j in range(i)]
        yield BlockSimilarity(
            block.name,
            block.kind,
            block.depth,
            block.size,
            min(pairs),
            sum(pairs) / len(pairs),
            max(pairs),
            analysis.norms(block.name),
        )


def _steps(planner: Planner, layout: Layout) -> Iterator[Step]:
    if not isinstance(planner, Dendrograms):
        for number, clusters in enumerate(planner.sizes):
            size = planner.plan(Target(models=clusters)).size
            yield Step(number, "", "", None, size.models, size.bytes)
        return
    done = [0] * len(layout.blocks)
    for number, size in enumerate(planner.trajectory):
        if number == 0:
            yield Step(0, "", "", None, size.models, size.bytes)
            continue
        index = planner.order.steps[number - 1]
        merge = planner.order.sequences[index][done[index]]
        done[index] += 1
        groups = f"{_names(layout, merge.first)} + {_names(layout, merge.second)}"
        block = layout.blocks[index].name
        yield Step(number, block, groups, merge.similarity, size.models, size.bytes)


def _names(layout: Layout, tasks: Sequence[int]) -> str:
    return ", ".join(layout.tasks[task] for task in tasks)
