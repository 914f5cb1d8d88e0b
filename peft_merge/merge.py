"""The driver: from adapters and a method to one merged adapter and its report."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.core.memory import limited
from mergekit_ext.declared import Call, Method
from mergekit_ext.errors import warn
from mergekit_ext.events import Dispatcher, MergeBegin, MergeEnd, SolverIteration, TensorMerged
from mergekit_ext.io.hub import Pushable, in_folder, upload_problems
from mergekit_ext.io.staging import place_problems
from mergekit_ext.kernels.precision import full_precision
from mergekit_ext.report.rho import rho_of
from peft_merge.adapter import Adapter
from peft_merge.coefficients import measured
from peft_merge.config.check import checked
from peft_merge.config.document import Source, models_of, read, request_of, written
from peft_merge.config.plan import MergePlan
from peft_merge.flexmerge import method as flexmerge
from peft_merge.flexmerge.manifest import FlexMerged
from peft_merge.io.merged import merged_adapter
from peft_merge.io.read import with_live
from peft_merge.io.write import card_of, save_adapter
from peft_merge.modules import merge_modules
from peft_merge.report import preview, report
from peft_merge.saved import merge_saved


@dataclass(frozen=True)
class MergedAdapter(Pushable):
    """A merged adapter.

    Attributes:
        adapter: as data.
        report: what `merge_report.json` holds: options, coefficients, and for each module ranks,
            relative truncation error and the rule's details.
        config: the merge as YAML; None of an extraction.
    """

    adapter: Adapter
    report: dict[str, Any]
    config: str | None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PEFT folder, which must not exist or be empty. It appears when it is complete.

        Raises:
            ConfigError: there is something at `path`, or it cannot be written.
        """
        save_adapter(self.adapter, path, merge_config=self.config, report=self.report)

    def _named(self, name: str) -> AbstractContextManager[Path]:
        card = card_of(replace(self.adapter, name=name), self.config, self.report)
        about: Any = {"merge_config": self.config, "report": self.report}
        return in_folder(partial(save_adapter, self.adapter, card=card, **about))


class CheckedPlan(MergePlan):
    """What a merge will do; as text, what ``peft-merge --check`` prints."""

    def __str__(self) -> str:
        return preview(self)


def merge_adapters(
    adapters: Sequence[Source] | Mapping[str, Source],
    method: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    rank: Any = None,
    patterns: bool | None = None,
    space: str | None = None,
    seed: int = 0,
    dtype: Any = None,
    device: Any = "cpu",
    modules_to_save: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    name: str = "merged",
    model: Any = None,
    callbacks: Iterable[object] = (),
    allow_pickle: bool = False,
    max_memory: int | str | None = None,
) -> Any:
    """Merge LoRA or (IA)^3 adapters of one base, without the base.

    Args:
        adapters: folders, names on the Hub, or adapters; a mapping gives them names.
        method: as `merge_method` in YAML: ``print(peft_merge.methods())``.
        weights: one for each adapter; default 1.
        parameters: of the method, for all adapters; values, gradients and filters, as in YAML.
        each: of the method, one mapping for each adapter.
        rank: of a merged LoRA: a number, "lossless", or {"energy": 0.99}; default: lossless for
            rules that are exact in the small, else the sum of the ranks.
        patterns: let ranks differ between modules, which only PEFT and vLLM read.
        space: where the method works; default: the changes themselves.
        seed: of random methods.
        dtype, base_model: of the result; default: those of the adapters.
        device: where is computed.
        modules_to_save: "average", "drop", or the name of an adapter.
        name: of the merged adapter.
        model: a PeftModel; names of its adapters may stand in `adapters`.
        callbacks: see `mergekit_ext.events`.
        allow_pickle: read adapter_model.bin, which can run code: trust its author.
        max_memory: bytes, or text such as "8GB"; a merge that needs more is refused.

    Returns:
        A `MergedAdapter`: `adapter`, `report`, `save(path)`; of `flexmerge` several adapters.

    Raises:
        ConfigError: something is wrong with arguments or adapters; it lists everything.
        NonFiniteError, MergeError: an adapter holds NaN or infinity, or the result would.

    Example:
        >>> merged = peft_merge.merge_adapters(["./code", "./maths"], "nan")
        >>> merged.save("merged")
    """
    if model is not None:
        adapters = with_live(model, adapters)
    models, problems = models_of(adapters, weights, each)
    base = os.fspath(base_model) if isinstance(base_model, os.PathLike) else base_model
    document: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    document |= {"rank": rank, "patterns": patterns, "space": space, "seed": seed, "dtype": dtype}
    document |= {"modules_to_save": modules_to_save, "base_model": base}
    request, wrong = request_of(document, "adapters")
    request = replace(request, device=device, name=name, allow_pickle=allow_pickle)
    with limited(max_memory, "max_memory"):
        return run(partial(checked, request, [*problems, *wrong]), callbacks)


def run_config(
    config: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    rank: Any = None,
    patterns: bool | None = None,
    device: Any = "cpu",
    callbacks: Iterable[object] = (),
    allow_pickle: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
) -> MergedAdapter | FlexMerged:
    """Merge as a YAML file (or its content as a mapping) says, and write the result.

    Args:
        config: see docs/adapters.md.
        out: the folder to write; it must not exist or be empty.
        rank, patterns: instead of the configuration's.
        device, callbacks, allow_pickle: as for `merge_adapters`.
        push_to_hub, private: upload the result to this repository, as `MergedAdapter.push_to_hub`;
            name and access are checked before the merge.

    Raises:
        ConfigError, NonFiniteError, MergeError: as `merge_adapters`; nothing is written.
        UploadError: the upload stopped; the output stands.

    Example:
        >>> peft_merge.run_config("adapters.yml", "merged").report["summary"]
    """
    options = {"rank": rank, "patterns": patterns, "device": device, "allow_pickle": allow_pickle}
    plan = partial(check, config, out, push_to_hub=push_to_hub, private=private, **options)
    result = run(plan, callbacks, os.fspath(out))
    if push_to_hub is not None:
        result.push_to_hub(push_to_hub, private=private)
    return result


def check(
    config: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    *,
    rank: Any = None,
    patterns: bool | None = None,
    device: Any = "cpu",
    allow_pickle: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
) -> CheckedPlan:
    """Check a merge of adapters without reading any factor: return what it would do.

    Args:
        config: the path of a YAML file, or its content as a mapping; see docs/adapters.md.
        out: the folder that would be written.
        rank, patterns, device, allow_pickle, push_to_hub, private: as for `run_config`.

    Returns:
        The plan: `kind`, `adapters`, `modules`, `rank`, `space`, `dtype`, `notes`; as text, what
        ``peft-merge --check`` prints.

    Raises:
        ConfigError: with all that is wrong.

    Example:
        >>> print(peft_merge.check("merge.yml"))
    """
    given = {"rank": rank, "patterns": patterns}
    instead = {key: value for key, value in given.items() if value is not None}
    request, problems = read(config, instead)
    problems += upload_problems(push_to_hub, private)
    name = request.name
    if out is not None:
        problems += place_problems(os.path.expanduser(out), str(out), empty=True)
        name = (Path(out).name if Path(out).name.isprintable() else "") or name
    request = replace(request, device=device, allow_pickle=allow_pickle, name=name)
    plan = checked(request, problems)
    return CheckedPlan(**vars(plan))


@full_precision()
def run(
    make_plan: Callable[[], MergePlan], callbacks: Iterable[object], out: str = ""
) -> MergedAdapter | FlexMerged:
    """Merge a plan, which is made inside; without `out` nothing is written."""
    started = time.perf_counter()
    with closing(Dispatcher(callbacks)) as events:
        plan = make_plan()
        names = tuple(adapter.name for adapter in plan.adapters)
        units = len(plan.modules) + len(plan.saved)
        events.emit(MergeBegin(plan.request.method, out, names, units, "module"))
        rule = plan.rule
        result = flexmerge.run(plan, events) if rule is None else _by_rule(plan, rule, events)
        if out:
            result.save(out)
        events.emit(MergeEnd(out, time.perf_counter() - started))
    return result


def _by_rule(plan: MergePlan, rule: Method, events: Dispatcher) -> MergedAdapter:
    for warning in plan.forewarnings:
        warn(warning)
    coefficients = measured(plan, rule, events)

    def resolve(module: str) -> Call:
        settings = plan.resolve(module)
        return settings.scaled(coefficients[module]) if coefficients else settings

    def iterated(*values: Any) -> None:
        events.emit(SolverIteration(*values))

    values, infos, details = dict[str, Any](), dict[str, Any](), dict[str, Mapping[str, Any]]()
    clock = time.perf_counter()
    for module, piece in merge_modules(plan, rule, resolve, iterated):
        before, clock = clock, time.perf_counter()
        values[module], infos[module], details[module] = piece.value, piece.info, piece.details
        events.emit(TensorMerged(module, tuple(piece.info.shape), piece.details, clock - before))
    saved = _saved(plan, events)
    adapter = merged_adapter(plan.request.name, values, infos, plan.adapters, saved, plan.patterns)
    for found in (*rule.after(rule.name, details), *rho_of(details, str).warnings(rule.name)):
        warn(found)
    entries = report(plan, details, coefficients)
    return MergedAdapter(adapter, entries, written(plan.request, plan.adapters))


def _saved(plan: MergePlan, events: Dispatcher) -> dict[str, Tensor]:
    tensors = {}
    for name, positions in plan.saved.items():
        clock = time.perf_counter()
        weights = plan.resolve.weights(name)
        adapters = [plan.adapters[i] for i in positions]
        tensors[name] = merge_saved(name, adapters, [weights[i] for i in positions], plan.forced)
        details = {"adapters": [adapter.name for adapter in adapters]}
        seconds = time.perf_counter() - clock
        events.emit(TensorMerged(name, tuple(tensors[name].shape), details, seconds))
    return tensors
