"""`tune`: a search over merges in memory, each scored as `sizes` scores a size."""

import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_ext.core import memory
from mergekit_ext.errors import MergeWarning, Problem, require
from mergekit_ext.flexmerge.layout import FLOATING
from mergekit_ext.flexmerge.merging import Walk, require_in_range
from mergekit_ext.host.architecture import settling
from mergekit_ext.host.checks.estimate import predicted
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_merge
from mergekit_ext.host.checks.schema import parse
from mergekit_ext.host.commands import source_of
from mergekit_ext.host.flexmerge.engine import Engine, open_inputs
from mergekit_ext.host.flexmerge.shared_tensors import Prepared
from mergekit_ext.host.flexmerge.sizes import Evaluate, Evaluator
from mergekit_ext.host.interface import interface
from mergekit_ext.host.method import ext_method, registered
from mergekit_ext.host.run import fresh_loaders
from mergekit_ext.host.session import Session, active
from mergekit_ext.kernels.precision import full_precision
from mergekit_ext.search import Document, Search, Tuned


@interface
def tune(
    config: Any,
    out: str | os.PathLike[str],
    evaluate: Evaluate,
    options: MergeOptions | None = None,
    *,
    trials: int = 30,
    seed: int = 0,
    tasks: Sequence[str] = (),
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Tuned:
    """Search for the values that a configuration leaves open (docs/tune.md).

    Args:
        config, options, max_memory, allow_pickle: as for `merge`; ``{from: 0.1, to: 2}`` and
            ``{choose: [a, b]}`` are open values, a list of methods is one, too.
        out: gets best.yml, tables, a plot, and the study, with which the same call goes on.
        evaluate: as for `sizes`; of several metrics the first one counts, the higher the better.
        trials: those of earlier calls included.
        tasks: what `evaluate` is called with; by default the names of the models.

    Raises:
        ConfigError: with all that is wrong, before any merge.
        EvaluationError, MergeError: no scores were returned; no trial gave a model.

    Example:
        >>> mergekit_ext.merge(mergekit_ext.tune("open.yml", "search", score).best, "merged")
    """
    given, folder = options or MergeOptions(), Path(os.path.expanduser(out))
    beside = {"quiet": True, "copy_tokenizer": False, "write_model_card": False}
    evaluator = Evaluator(evaluate, given.model_copy(update=beside))
    with fresh_loaders(), full_precision(), evaluator.counting("", 0), TemporaryDirectory() as at:
        search = _Merges(source_of(config), folder, evaluator, tasks, Path(at))
        return search.run(folder, trials, seed, given.quiet)


class _Merges(Search):
    """Merges in memory. Configurations of outputs are written to `place`."""

    def __init__(
        self, text: str, folder: Path, evaluator: Evaluator, tasks: Sequence[str], place: Path
    ):
        self._evaluator, self._options, self._place = evaluator, evaluator.options, place
        self.tasks, self._given = list(tasks), bool(tasks)
        # Of one setting of all but the factor: merges by the factor.
        self._key, self._points = "", dict[float, dict[str, Tensor]]()
        super().__init__(text, folder, "OUT_PATH")

    def parameters(self, method: Any) -> Collection[str]:
        known = registered().get(method)
        return {p.name for p in known.spec.parameters} if known else ()

    def check(self, document: Document) -> Iterable[Problem]:
        config, problems = parse(document)
        if config is None:
            return problems
        report, checked = check_merge(config, self._options, document)
        if isinstance(checked, Prepared):
            self.tasks = list(checked.layout.tasks)
        elif not self._given:
            models = (model for model in models_at(config) if model != config.base_model)
            self.tasks = list(dict.fromkeys(Path((m.lora or m.model).path).name for m in models))
        if (cost := report.estimate) is None or report.problems:
            return report.problems
        # One is scored, and two in float32 give others.
        parts = {**cost.need.parts, "merged models": cost.bytes_written + 8 * cost.parameters}
        return memory.problems(replace(cost.need, parts=parts))

    def evaluated(self, document: Document) -> Iterator[tuple[str, Mapping[str, float]]]:
        config, _ = parse(document)
        report, checked = check_merge(config, self._options, document)
        require(report.problems, "this trial")
        if isinstance(checked, Prepared):
            dtype, models = checked.forced, self._flexmerged(checked)
        else:
            tensors = self._merged(config, document, checked)
            models = iter([(self._place, tensors)] * len(self.tasks))
            dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        for task, (folder, found) in zip(self.tasks, models, strict=True):
            yield task, self._evaluator.score(folder, found, task, f"{task} in a trial", dtype)

    def _flexmerged(self, prepared: Prepared) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Yield the tasks' models; an analysis is kept for other trials."""
        with TemporaryDirectory(dir=self._place) as scratch, active(Session()) as session:
            reader, folders = open_inputs(prepared)
            engine = Engine(prepared, reader, self._place, session, Path(scratch))
            if engine.merging.residuals is None:
                engine.save_analysis(self._place)
            walk = Walk(reader, engine.merging)
            walk.go(engine.planner.plan(prepared.target))
            yield from ((folder, walk.tensors(task)) for task, folder in enumerate(folders))

    def _merged(self, config: Any, document: Document, checked: Any) -> dict[str, Tensor]:
        """Merge; where only the factor differs from two merges before, on the line through them."""
        shared, headers = document.get("parameters") or {}, predicted(checked.located, config)
        name = next((name for name in ("scale", "lambda") if name in shared), "")
        factor, ours = shared.get(name), ext_method(config.merge_method) is not None
        known = all(header and header.dtype in FLOATING for header in headers.values())
        if not (ours and known and isinstance(factor, float)):
            return self._merge(config, checked)
        key = json.dumps({**document, "parameters": {**shared, name: ""}}, default=str)
        if key != self._key:
            self._key, self._points = key, {}
        if len(self._points) == 2:
            (one, start), (two, end) = self._points.items()
            wide = {n: torch.lerp(start[n], end[n], (factor - one) / (two - one)) for n in start}
        else:  # cast below, once, as by the method itself
            wide = self._merge(config.model_copy(update={"out_dtype": "float32"}), checked)
            if all(abs(factor - other) > 0.1 * abs(factor) for other in self._points):
                self._points[factor] = wide
        cast = {n: wide[n].to(FLOATING[header.dtype]) for n, header in headers.items() if header}
        for tensor, made in cast.items():
            require_in_range(made, tensor)
        return cast

    def _merge(self, config: Any, checked: Any) -> dict[str, Tensor]:
        """Let mergekit merge, and keep the tensors in place of writing them."""
        from mergekit.merge import run_merge  # which `patches` extends

        session, tensors = Session(), dict[str, Tensor]()
        session.writer = SimpleNamespace(  # type: ignore[assignment]
            finished=frozenset(),
            save_tensor=lambda name, tensor, clone=False: tensors.update({name: tensor}),
            finalize=lambda: None,
        )
        with active(session), settling(checked.settled), warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            getattr(run_merge, "stock", run_merge)(config, os.fspath(self._place), self._options)
        return tensors
