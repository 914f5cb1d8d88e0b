"""Search the values that a configuration leaves open, with Optuna."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from filelock import FileLock

from mergekit_ext.errors import ConfigError, MergeError, Problem, join, one_line, shown
from mergekit_ext.events import takes
from mergekit_ext.io.documents import read
from mergekit_ext.io.staging import KINDS, place_problems
from mergekit_ext.report.tables import plot_trials, write_rows

_FORMS = "{from: 0.1, to: 2}, also with `log: true` or `step: 0.1`, or {choose: [a, b]}"
Document = dict[str, Any]


class Tuned(NamedTuple):
    """The configuration `best`, its mean score of all tasks, and the rows of tune.csv."""

    best: Document
    score: float
    trials: Sequence[Document]


class Search:
    """A search over the documents that a YAML text with open places stands for.

    Subclasses say what `parameters` a method has, what is wrong with a document (`check`, which may
    set `tasks`), and yield the scores of each task (`evaluated`).

    Raises:
        ConfigError: with the problems of the form, of `folder`, which messages call `where`, and of
            some documents: one for each method, and others in which one value differs.
    """

    tasks: list[str]
    parameters: Callable[[Any], Collection[str]]
    check: Callable[[Document], Iterable[Problem]]
    evaluated: Callable[[Document], Iterator[tuple[str, Mapping[str, float]]]]

    def __init__(self, text: str, folder: Path, where: str):
        installed = importlib.util.find_spec("optuna") is not None
        documents, repeated = read(text)
        place = place_problems(folder, where, without=("config.json", *KINDS))
        wrong, document = [*repeated, *place], documents[0] if documents else None
        if len(documents) > 1:
            wrong.append(Problem("the file", f"{len(documents)} documents", "one merge"))
        self.document: Document = document if isinstance(document, dict) else {}
        if isinstance(methods := self.document.get("merge_method"), list):
            self.document["merge_method"] = {"choose": methods}
        nodes: Document = {}
        _walk(self.document, nodes.setdefault)
        self.open, samples = Document(), Document()
        if not nodes:
            wrong.append(Problem("the configuration", "nothing open", _FORMS))
        for where, node in nodes.items():
            try:
                make, samples[where] = _distribution(node)
                self.open[where] = make() if installed else None
            except (KeyError, TypeError, ValueError) as error:  # noqa: PERF203
                wrong.append(Problem(where, shown(node), _FORMS, f"({one_line(error)})"))
        self._methods = samples.get("merge_method", [self.document.get("merge_method")])
        first = {where: values[0] for where, values in samples.items()}
        tried = [{**first, "merge_method": method} for method in self._methods]
        tried += [{**one, at: v} for one in tried for at, vs in samples.items() for v in vs[1:]]
        found = {(problem.where, problem.expected): problem for problem in wrong}
        for filled in [] if found else map(self.filled, tried):
            for problem in self.check(filled):
                found.setdefault((problem.where, problem.expected), problem)
        if not installed:
            remedy = "Run: pip install 'mergekit-ext[tune]'"
            found["optuna", ""] = Problem("optuna", "no such package", "the extra `tune`", remedy)
        if found:
            raise ConfigError(found.values(), "this search")

    def filled(self, values: Mapping[str, Any]) -> Document:
        """Return a document; where methods are open, without what only others of them have."""
        known = {name for method in self._methods for name in self.parameters(method)}
        out = known - {*self.parameters(values.get("merge_method", self._methods[0]))}
        return _walk(self.document, lambda where, _: values[where], "", out)

    def run(self, folder: Path, trials: int, seed: int, quiet: bool) -> Tuned:
        """Go on with the study in `folder` until it has so many trials; return what it has found.

        A trial with a `MergeError` or `ConfigError` has failed.
        """
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
        from optuna.trial import TrialState
        from tqdm import tqdm

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        path, tasks, why = str(folder / "study.log"), self.tasks, ""
        about = json.loads(json.dumps([self.document, tasks], default=str))
        lock = FileLock(folder / ".study.lock")  # unlike Optuna's, given up by a killed process
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(path, lock)),  # type: ignore[arg-type]
                # When half of the tasks are scored, the lowest quarter stops.
                pruner=optuna.pruners.PercentilePruner(75.0, 10, (len(tasks) + 1) // 2),
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
            )
            known = study.user_attrs.get("about", about)
        except (KeyError, TypeError, ValueError) as error:  # of a file that is no study
            known = one_line(error)
        if known != about:
            expected = "a study of this configuration and these tasks"
            problem = Problem(path, shown(known), expected, "Choose another folder.")
            raise ConfigError([problem], "this search")
        study.set_user_attr("about", about)
        for killed in study.get_trials(states=[TrialState.RUNNING]):
            study.tell(killed.number, state=TrialState.FAIL)
        tuned = self._written(folder, study)
        bar = tqdm(total=trials, desc="Tuning", initial=len(tuned.trials), disable=quiet)
        while (count := len(tuned.trials)) < trials:
            # The same whether the search was stopped before or not.
            study.sampler = optuna.samplers.TPESampler(seed=seed + count)
            trial, state, scores, values = study.ask(self.open), TrialState.COMPLETE, {}, []
            try:
                for task, scores[task] in self.evaluated(self.filled(trial.params)):  # noqa: B007
                    values = [next(iter(found.values())) for found in scores.values()]
                    # A sum: pruning looks at the highest, which is the last one so.
                    trial.report(sum(values), len(values))
                    if len(values) < len(tasks) and trial.should_prune():
                        state = TrialState.PRUNED
                        break
            except (ConfigError, MergeError) as error:
                state, why = TrialState.FAIL, str(error)
            trial.set_user_attr("scores", scores)
            study.tell(trial, fmean(values) if state == TrialState.COMPLETE else None, state)
            tuned = self._written(folder, study)
            bar.set_postfix(best=tuned.score, refresh=False)
            bar.update()
        bar.close()
        if not tuned.best:
            raise MergeError(f"none of {trials} trials gave a model; the last: {why}")
        with suppress(ImportError):  # what is not drawn is in the tables
            plot_trials(folder / "tune.png", [row["score"] for row in tuned.trials])
        return tuned

    def _written(self, folder: Path, study: Any) -> Tuned:
        """Write and return what a study has so far; `best` is empty if no trial is complete."""
        rows: list[Document] = []
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and "scores" in trial.user_attrs:
                scores, state = trial.user_attrs["scores"], trial.state.name.lower()
                score = trial.value if state == "complete" else None
                each = {f"{task}/{m}": v for task, of in scores.items() for m, v in of.items()}
                head = {"trial": len(rows) + 1, "state": state, "score": score}
                rows.append({**head, **trial.params, **each})
        columns = dict.fromkeys(column for row in rows for column in row)
        whole = [{column: row.get(column) for column in columns} for row in rows]
        (folder / "tune.json").write_text(json.dumps({"format_version": 1, "trials": whole}))
        if rows:
            write_rows(folder / "tune.csv", whole)
        if all(row["score"] is None for row in rows):
            return Tuned({}, float("nan"), whole)
        document = self.filled(study.best_params)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (folder / "best.yml").write_text(text, encoding="utf-8")
        return Tuned(document, study.best_value, whole)


def _walk(
    node: Any, pick: Callable[[str, Any], Any], where: str = "", left_out: Collection[str] = ()
) -> Any:
    """Return a document with what `pick` returns in open places."""
    if isinstance(node, dict) and {"from", "to", "choose"} & node.keys():
        return pick(where, node)
    if isinstance(node, dict):
        out = left_out if where.endswith("parameters") else ()
        items = ((key, value) for key, value in node.items() if key not in out)
        return {key: _walk(value, pick, join(where, key), left_out) for key, value in items}
    if isinstance(node, list):
        return [_walk(value, pick, join(where, i), left_out) for i, value in enumerate(node)]
    return node


def _distribution(node: Document) -> tuple[Callable[[], Any], Sequence[Any]]:
    """Return what makes Optuna's, and all values of a choice; of a range ends and one between."""

    def make(kind: str, *values: Any) -> Any:
        from optuna import distributions

        return getattr(distributions, f"{kind}Distribution")(*values, **rest)

    rest = {key: value for key, value in node.items() if key not in ("from", "to", "choose")}
    if "choose" in node:
        values = [*node["choose"]]
        return partial(make, "Categorical", values), values or [None]
    low, high = float(node["from"]), float(node["to"])
    if isinstance(rest.get("step"), int) and low % 1 == high % 1 == 0:
        return partial(make, "Int", int(low), int(high)), [int(low), int(high)]
    return partial(make, "Float", low, high), [low, high, low / 3 + high * 2 / 3]


def function_named(name: str, where: str, *arguments: str) -> Callable[..., Any]:
    """Return ``module:function``, which takes `arguments`."""
    module, _, attribute = name.partition(":")
    remedy = "Write scores:evaluate for scores.py, and run the command in its folder."
    # As for `python -m`: the user's module lies where the command is run.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may come
        name = f"{name} ({type(error).__name__}: {error})" if attribute else f"{name} alone"
        expected = "MODULE:FUNCTION, which can be imported from here"
        raise ConfigError([Problem(where, name, expected, remedy)], "this command") from None
    if not takes(function, *arguments):
        expected = f"a function of {' and '.join(arguments) or 'no arguments'}"
        raise ConfigError([Problem(where, name, expected)], "this command")
    return function
