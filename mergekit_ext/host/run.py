"""One merge from configuration to folder: checked, staged, reported, listened to."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import BasePolicy, MergeMethod
from mergekit.options import MergeOptions

import mergekit_ext
from mergekit_ext import parallel
from mergekit_ext.core.parameters import AUTO, Values
from mergekit_ext.declared.method import factor_of_snapshots
from mergekit_ext.errors import ConfigError, MergekitExtError, MergeWarning, Problem, require, warn
from mergekit_ext.host import identity
from mergekit_ext.host import session as sessions
from mergekit_ext.host.adapters.fitted import applies
from mergekit_ext.host.architecture import Settled, settling
from mergekit_ext.host.checks.estimate import predicted
from mergekit_ext.host.checks.layout import models_at
from mergekit_ext.host.checks.merge import check_merge, check_stock
from mergekit_ext.host.commands import for_commands, parsed, source_of
from mergekit_ext.host.companions import completed
from mergekit_ext.host.flexmerge import FlexMergeMethod
from mergekit_ext.host.inputs import models_of
from mergekit_ext.host.method import ExtMethod, ext_method, is_stock, registered
from mergekit_ext.io.headers import allowing_pickles
from mergekit_ext.io.hub import upload_problems
from mergekit_ext.io.staging import place_problems
from mergekit_ext.kernels.precision import full_precision
from mergekit_ext.report.card import in_effect

RESTART_VARIABLE = "MERGEKIT_EXT_RESTART"


def merge(
    config: Any,
    out_path: str | os.PathLike[str],
    options: MergeOptions | None = None,
    *,
    callbacks: Iterable[object] = (),
    restart: bool = False,
    keep_solution: str | os.PathLike[str] | None = None,
    config_source: str | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
) -> None:
    """Merge; see `interface.merge`."""
    from mergekit.merge import run_merge  # which `patches` extends by this module

    if not isinstance(config, MergeConfiguration):
        config_source = source_of(config)
        config = parsed(config_source)
    out_path, options = os.path.expanduser(out_path), options or MergeOptions()
    method = ext_method(config.merge_method)
    whole = isinstance(method, FlexMergeMethod)  # which reports itself
    unshared = list(identity.process_problems(config.merge_method, options))
    processes, options = parallel.current(), identity.own_options(options)
    with fresh_loaders(), full_precision():
        report, checked = check_merge(config, options, config_source)
        source = config_source or config.to_yaml()
        inputs = models_of(config)
        paths = [part.path for part in identity.parts_of(inputs)]
        needed = report.estimate.bytes_written if report.estimate else 0
        place = processes.from_main(
            lambda: [
                *place_problems(out_path, "OUT_PATH", paths, empty=whole, needed=needed),
                *upload_problems(push_to_hub, private),
            ]
        )
        require([*report.problems, *place, *unshared])
        decides = identity.identity(source, options, inputs)
        kept = identity.solution(keep_solution, config, method, decides)
        identity.require_same(processes, {**decides, "output": os.fspath(Path(out_path).resolve())})
        if whole:  # whose lines in the journal say what each finished piece depends on
            del decides["configuration"]
        weights = identity.weights_of(config.referenced_models())
        for text in report.warnings if processes.is_main else ():
            warn(MergeWarning(text))
        with sessions.output(
            options,
            out_path,
            None if whole else method,
            callbacks,
            decides if whole or options.safe_serialization else None,
            restart or os.environ.get(RESTART_VARIABLE) == "1",
            "" if whole or method else config.merge_method,
        ) as folder:
            session = sessions.current()
            assert session is not None
            session.dequantised, session.solution = report.dequantised, kept
            spec = registered()[config.merge_method].spec
            defaults = {p.name: None if p.required else p.default for p in spec.parameters}
            shared = {"merge_method": spec.name, **defaults, **(config.parameters or {})}
            each = [model.parameters or {} for model in config.models or ()]
            session.paper, session.parameters = spec.reference_url or "", in_effect(shared, each)
            if report.estimate:
                session.operations = report.estimate.operations
                if report.estimate.time:
                    session.say(f"Time: {report.estimate.time}")
            if kept is not None:
                kept.open()
            try:
                if whole:
                    from mergekit_ext.host.flexmerge.engine import write

                    write(checked, config, folder, source)
                else:
                    session.predicted = predicted(checked.located, config)
                    stock = getattr(run_merge, "stock", run_merge)
                    with completed(config, folder, options) as quiet, settling(checked.settled):
                        stock(config, os.fspath(folder), quiet, source)
            except Exception as error:
                if not isinstance(error, MergekitExtError):
                    # Whatever a library reports of files that were written to meanwhile.
                    identity.require_unchanged(weights)
                raise
            processes.from_main(lambda: identity.require_unchanged(weights))


def extended(
    stock: Callable[..., None],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
) -> None:
    """Extend ``run_merge``: merges with the project's methods are `merge`.

    Models that mergekit merges itself are checked. A problem stops it where an adapter is applied
    while reading; otherwise it is a warning.
    """
    # An unknown name is probably one of ours, misspelt: the checks know the nearest.
    if not is_stock(merge_config.merge_method):
        with for_commands():
            merge(merge_config, out_path, options, config_source=config_source)
        return
    models = list(models_at(merge_config))
    adapted, found = any(map(applies, models)), Settled()
    # Pickles that mergekit's own methods read are mergekit's to refuse.
    with allowing_pickles(True), fresh_loaders():
        # What mergekit downloads is looked at by mergekit.
        if adapted or all(os.path.isdir(model.model.path) for model in models):
            with for_commands():
                report, checked = check_stock(merge_config, options)
                found = checked.settled
                if adapted:
                    require(report.problems)
                for text in (*map(str, report.problems), *report.warnings):
                    warn(MergeWarning(text))
        with for_commands() if adapted else nullcontext(), settling(found):
            stock(merge_config, out_path, options, config_source)


@contextmanager
def fresh_loaders() -> Iterator[None]:
    """Forget open files before and after; keep the collector from what is loaded already.

    mergekit's cache outlives merges: a file that was replaced would be read by its old index. And
    planning makes many small objects, for which the libraries' would be collected over and over.
    """
    _forget_loaders()
    frozen = gc.get_freeze_count() == 0  # a caller's own freeze is left alone
    if frozen:
        gc.freeze()
    try:
        yield
    finally:
        if frozen:
            gc.unfreeze()
        _forget_loaders()


def _forget_loaders() -> None:
    LoaderCache().flush_all()
    LoaderCache.loaders.clear()


def snapshot_merge(
    method: str, models: Sequence[Path], base: Path | None, given: Values, device: str, seed: int
) -> tuple[dict[str, Any], MergeOptions]:
    """Return configuration and options of a merge of saved models.

    A required `weight` is 1 by default, and a factor `auto` (`factor_of_snapshots`), where there is
    something to measure from. `ConfigError` for a method that makes several models.
    """
    known, defaults = _known(method), dict[str, Any]()
    if isinstance(known, FlexMergeMethod):
        expected = "a method that makes one model"
        raise ConfigError([Problem("method", repr(method), expected)])
    if known and any(p.name == "weight" and p.required for p in known.spec.parameters):
        defaults["weight"] = 1.0
    if isinstance(known, ExtMethod):
        shared = {p.name: p.default for p in known.spec.shared_parameters}
        factor = factor_of_snapshots(shared)
        if factor and (base is not None or (factor == "lambda" and not known.declared.base)):
            defaults[factor] = AUTO
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": os.fspath(model)} for model in models],
        "parameters": {**defaults, **given},
    }
    if base is not None:
        document["base_model"] = os.fspath(base)
    tokenizer = any(models[-1].glob("tokenizer*"))
    # 0 is the seed without one; MergeOptions sets torch's global seed to any other.
    return document, MergeOptions(
        quiet=True, device=device, random_seed=seed or None, copy_tokenizer=tokenizer
    )


def needs_base(method: str) -> bool:
    """Whether a registered method cannot do without a base model."""
    known = _known(method)
    return known is not None and bool(known.spec.contract.base == BasePolicy.REQUIRED)


def _known(method: str) -> MergeMethod | None:
    mergekit_ext.register()
    return registered().get(method)
