"""How alike the models of a FlexMerge are, and what each size would merge."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from mergekit.options import MergeOptions

from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.flexmerge.plan import Dendrograms
from mergekit_ext.flexmerge.residual import ResidualStorage
from mergekit_ext.flexmerge.storage import Size, Target
from mergekit_ext.host.flexmerge.engine import Engine, open_inputs
from mergekit_ext.host.flexmerge.prepare import prepare_tables
from mergekit_ext.host.interface import interface
from mergekit_ext.host.session import listening
from mergekit_ext.kernels.similarity import cosines
from mergekit_ext.report.tables import plot_similarity, similarity_table, steps_table, write_rows


class Similarities(NamedTuple):
    """Rows of `analyze`: the cosines in every `block`, and the size after each of the `steps`.

    Columns are those of similarity.csv and steps.csv; as text, tables of both.
    """

    blocks: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    notes: list[str]

    def __str__(self) -> str:
        tables = similarity_table(self.blocks), steps_table(self.steps)
        return "\n\n".join(["\n".join(self.notes), *tables])


@interface
def analyze(
    config: Any,
    out: str | os.PathLike[str] | None = None,
    options: MergeOptions | None = None,
    *,
    plot: bool = True,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Similarities:
    """Measure how alike the models of a `flexmerge` configuration are, and merge nothing.

    Args:
        config: as for `merge`; its `target_size` is not used.
        out: a folder that gets similarity.csv, steps.csv, similarity.png, and the analysis, which
            merges into this folder or beside it use again.
        options, max_memory, allow_pickle: as for `merge`.
        plot: draw similarity.png.

    Returns:
        `Similarities`: a row for each block, and one for each merge, from m models to one; as
        text, what ``mergekit-ext analyze`` prints.

    Raises:
        ConfigError: with all that is wrong; NonFiniteError: a model holds NaN or infinity.

    Example:
        >>> print(mergekit_ext.analyze("flex.yml"))
    """
    options = options or MergeOptions()
    with TemporaryDirectory() as scratch:
        folder = Path(os.path.expanduser(out or scratch))
        ((report, prepared),) = prepare_tables(config, folder, options).values()
        if isinstance(prepared.storage, ResidualStorage):
            remedy = "`mergekit-ext check` names the sizes that can be reached."
            found, expected = "one base and residuals", "an algorithm that merges groups"
            raise ConfigError([Problem("parameters.algorithm", found, expected, remedy)])
        folder.mkdir(parents=True, exist_ok=True)
        with listening(options, (), os.fspath(folder)) as session:
            reader, _ = open_inputs(prepared)
            engine = Engine(prepared, reader, folder, session, folder)
            engine.save_analysis(folder)
            blocks, steps = list(_similarities(engine)), list(_steps(engine))
        write_rows(folder / "similarity.csv", blocks)
        write_rows(folder / "steps.csv", steps)
        notes = list(report.notes)
        if plot and out is not None:
            try:
                whole = cosines(torch.stack([*engine.grams]).sum(0)).fill_diagonal_(torch.nan)
                alike = dict(zip(engine.layout.tasks, whole.tolist(), strict=True))
                plot_similarity(folder / "similarity.png", alike, blocks, steps)
            except ImportError as error:
                # One of an earlier run would not belong to the tables.
                (folder / "similarity.png").unlink(missing_ok=True)
                notes.append(f"No plot: {error}.")
    return Similarities(blocks, steps, notes)


def _similarities(engine: Engine) -> Iterator[dict[str, Any]]:
    tasks = engine.layout.tasks
    for block, gram in zip(engine.layout.blocks, engine.grams, strict=True):
        found = cosines(gram)
        pairs = [float(found[i, j]) for i in range(len(found)) for j in range(i)]
        norms = engine.analysis.grams[block.name].diagonal().sqrt().tolist()
        about = {"kind": block.kind, "depth": block.depth, "elements": block.size}
        spread = {"lowest": min(pairs), "mean": sum(pairs) / len(pairs), "highest": max(pairs)}
        lengths = {f"norm/{task}": norm for task, norm in zip(tasks, norms, strict=True)}
        yield {"block": block.name, **about, **spread, **lengths}


def _steps(engine: Engine) -> Iterator[dict[str, Any]]:
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
