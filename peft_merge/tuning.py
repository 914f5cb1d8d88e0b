"""`tune` for adapters: each trial is merged in memory, and scored on the base model."""

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch.nn import Module

from mergekit_ext.declared import ADAPTERS
from mergekit_ext.errors import ConfigError, MergeWarning, Problem
from mergekit_ext.io.documents import text_of
from mergekit_ext.report.tables import scores_of
from mergekit_ext.search import Document, Search, Tuned
from peft_merge.adapter import Adapter
from peft_merge.config.document import plain
from peft_merge.flexmerge.load import put_on, require_base
from peft_merge.flexmerge.manifest import FlexMerged
from peft_merge.flexmerge.method import NAME, OWN
from peft_merge.merge import check, run
from peft_merge.modules import rules


def tune(
    config: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    evaluate: Callable[[Any, str], Any],
    base_model: Any,
    *,
    trials: int = 30,
    seed: int = 0,
    tasks: Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> Tuned:
    """Search for the values that a merge of adapters leaves open, as `mergekit_ext.tune` does.

    Args:
        config: as for `check`; `options` are its `device` and `allow_pickle`.
        evaluate: ``evaluate(model, task)`` gets a PeftModel in evaluation mode: `base_model`, a
            model without adapters or a function that makes it, with the merged adapter, of a
            `flexmerge` the task's.

    Raises:
        ConfigError: with all that is wrong, or with what the base lacks; before any merge.
        EvaluationError, MergeError: `evaluate` raised, or gave no scores; no trial gave an adapter.

    Example:
        >>> peft_merge.tune("open.yml", "search", score, base_model).best
    """
    text = yaml.safe_dump(plain(config)) if isinstance(config, Mapping) else text_of(Path(config))
    folder = Path(os.path.expanduser(out))
    search = _Merges(text, folder, evaluate, base_model, list(tasks), options)
    return search.run(folder, trials, seed, quiet)


class _Merges(Search):
    """Merges in memory of adapters that are opened once."""

    def __init__(self, text: str, folder: Path, evaluate: Any, base: Any, *given: Any):
        self._evaluate, (self._tasks, self._options) = evaluate, given
        self._adapters, self._metrics = dict[str, Adapter](), dict[str, set[str]]()
        super().__init__(text, folder, "OUT")
        self._base = base() if callable(base) and not isinstance(base, Module) else base
        require_base(self._base)
        for adapter in self._adapters.values():
            put_on(self._base, [adapter])

    def parameters(self, method: Any) -> Collection[str]:
        known = {NAME: OWN, **{name: rule.for_driver(ADAPTERS) for name, rule in rules().items()}}
        return {parameter.name for parameter in known.get(str(method), ())}

    def check(self, document: Document) -> Iterable[Problem]:
        try:
            plan = check(document, **self._options)
        except ConfigError as error:
            return error.problems
        names = [adapter.name for adapter in plan.adapters]
        self.tasks = self._tasks if self._tasks and plan.rule else names
        sources = [each["model"] for each in document["models"]]
        self._adapters |= zip(sources, plan.adapters, strict=True)
        return ()

    def evaluated(self, document: Document) -> Iterator[tuple[str, Mapping[str, float]]]:
        opened = [{**each, "model": self._adapters[each["model"]]} for each in document["models"]]
        plan = partial(check, {**document, "models": opened}, **self._options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged = run(plan, ())
        for adapter in merged.adapters if isinstance(merged, FlexMerged) else [merged.adapter]:
            model = put_on(self._base, [adapter])
            for task in [adapter.name] if isinstance(merged, FlexMerged) else self.tasks:
                what = f"{task} in a trial"
                yield task, scores_of(self._evaluate, model, task, what, self._metrics)
