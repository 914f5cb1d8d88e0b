"""Snapshots of the adapter of a PeftModel; merged as changes, never A and B apart."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_ext.callbacks.kinds import Kind, Shape
from mergekit_ext.callbacks.processes import agree, is_main, unwrapped
from mergekit_ext.callbacks.settings import SUBJECT, Settings
from mergekit_ext.callbacks.weights import Weights, saved, write
from mergekit_ext.errors import ConfigError, MergeError, Problem

# The adapter that merged weights become in the live model.
LOADED = "merged"
# What they are while they are evaluated.
_CANDIDATE = "merged_candidate"


class AdapterWeights(Kind):
    """One adapter: its factors or vectors, and the whole tensors that it carries."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._trained = ""

    def view(self, model: Any) -> Weights:
        """See `Kind.view`; of the adapter that is trained."""
        from peft_merge.io import adapters_of, state_dict

        (adapter,) = adapters_of(unwrapped(model), [self._name(unwrapped(model))])
        return Weights(state_dict(adapter), adapter.config)

    @property
    def needs_base(self) -> bool:
        """The frozen base model is the base."""
        return False

    def problems(self, weights: Weights, count: int, has_base: bool) -> Iterable[Problem]:
        """See `Kind.problems`."""
        from peft_merge.config.check import checked
        from peft_merge.config.document import Input, Request
        from peft_merge.methods import rules

        settings = self.settings
        unknown = settings.adapter_options.keys() - {"rank", "space", "modules_to_save", "dtype"}
        for name in sorted(unknown):
            expected = "rank, space, modules_to_save or dtype"
            yield Problem(f"adapter_options.{name}", "an unknown option", expected)
        if has_base:
            expected = "nothing: adapters are merged as changes of the model's frozen weights"
            yield Problem("base", "a base", expected, "Leave it out.")
        if settings.running is None and settings.method not in rules():
            expected = "a method of `peft-merge` that makes one adapter (docs/adapters.md)"
            yield Problem("method", repr(settings.method), expected)
            return
        if unknown:
            return
        shared, each = self._parameters()
        for name, values in each.items():
            if len(values) != count:
                expected = f"one value for all snapshots, or a list of {count}, one for each"
                yield Problem(f"parameters.{name}", f"{len(values)} values", expected)
        inputs = tuple(
            Input("adapter", _adapter(weights, f"snapshot {i}"), None, None, own, "parameters")
            for i, own in enumerate(
                _for_each(each, min(map(len, each.values()), default=1)) or [{}]
            )
        )
        request = Request(
            method="linear" if settings.running else settings.method,
            inputs=inputs,
            parameters=shared,
            seed=settings.seed,
            device=settings.device,
            subject=SUBJECT,
            **settings.adapter_options,
        )
        try:
            checked(request)
        except ConfigError as error:
            yield from error.problems

    def unlike(self, weights: Weights, first: Mapping[str, Shape]) -> Iterable[Problem]:
        """See `Kind.unlike`; adapters of several ranks and modules can be merged."""
        if weights.config is None:
            yield Problem("model", "whole weights", "an adapter, as the first snapshot was")

    def unlike_base(self, weights: Weights, base: Weights) -> Iterable[Problem]:
        """See `Kind.unlike_base`; there is none."""
        return ()

    def saved(self, checkpoint: Path) -> Path:
        """See `Kind.saved`."""
        return saved(checkpoint, self._trained or self.settings.adapter)

    def merge(
        self, snapshots: Mapping[int, Weights], base: Weights | None
    ) -> tuple[Weights, Mapping[str, Any]]:
        """See `Kind.merge`."""
        settings = self.settings
        shared, each = self._parameters()
        return self._merged(
            {f"step-{step}": weights for step, weights in snapshots.items()},
            settings.method,
            parameters=shared,
            each=_for_each(each, len(snapshots)),
            callbacks=settings.callbacks,
            **settings.adapter_options,
        )

    def blend(self, mean: Weights | None, new: Weights, weight: float) -> Weights:
        """See `Kind.blend`: products are blended, in float64, without loss of rank.

        The rank grows with every snapshot, up to that of the adapted matrices.
        """
        parts = {} if mean is None else {"mean": (mean, 1 - weight)}
        parts["new"] = (new, weight)
        merged, _ = self._merged(
            {name: part for name, (part, _) in parts.items()},
            "linear",
            weights=[share for _, share in parts.values()],
            parameters={"normalize": False},
            dtype="float64",
            **self._saved_option(),
            **({} if _is_ia3(new) else {"rank": "lossless"}),
        )
        return merged

    def finished(self, mean: Weights, like: Mapping[str, str]) -> Weights:
        """See `Kind.finished`; cut to `rank` if that was asked for."""
        options = {"dtype": "float64", **self.settings.adapter_options}
        merged, _ = self._merged({"mean": mean}, "linear", **options)
        if "dtype" in self.settings.adapter_options:
            return merged
        tensors = {k: t.to(getattr(torch, like[k])) for k, t in merged.tensors.items()}
        return Weights(tensors, merged.config)

    @contextmanager
    def applied(self, model: Any, weights: Weights) -> Iterator[None]:
        """See `Kind.applied`."""
        inner = unwrapped(model)
        trained = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
        active = inner.active_adapter
        try:
            self._add(inner, weights, _CANDIDATE)
            yield
        finally:
            inner.set_adapter(active)
            if _CANDIDATE in inner.peft_config:
                inner.delete_adapter(_CANDIDATE)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    def apply(self, model: Any, weights: Weights) -> None:
        """Add the merged adapter and make it the active one; the trained one stays."""
        inner = unwrapped(model)
        self._name(inner)  # before another adapter is the active one
        if LOADED in inner.peft_config:
            inner.delete_adapter(LOADED)
        self._add(inner, weights, LOADED)

    def _add(self, model: Any, weights: Weights, name: str) -> None:
        modes = {module: module.training for module in model.modules()}
        with tempfile.TemporaryDirectory() as room:
            folder = Path(room) / name
            write(weights, folder)
            model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
        model.set_adapter(name)
        for module in model.modules():  # PEFT has switched all to evaluation
            module.training = modes.get(module, modes[model])

    def share(self, model: Any, weights: Weights | None) -> None:
        """See `Kind.share`."""
        sent = None if weights is None else Weights(dict(weights.tensors), weights.config)
        shared = agree(sent if is_main() else None)
        self.apply(model, shared)

    def _name(self, model: Any) -> str:
        """The adapter that is trained: what was active when the model was seen first."""
        self._trained = self._trained or self._find(model)
        return self._trained

    def _parameters(self) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
        """Parameters for all snapshots, and lists with a value for each.

        To `merge_adapters` a list is a gradient over layers, or one of filters.
        """
        from peft_merge.methods import parameters_of, rules

        if self.settings.running is not None:
            return {}, {}
        given = self.settings.parameters
        method = rules()[self.settings.method]
        own = {p.name for p in parameters_of(method, given) if p.per_model}
        each: dict[str, Sequence[Any]] = {
            name: value
            for name, value in given.items()
            if name in own
            and isinstance(value, (list, tuple))
            and not any(isinstance(item, Mapping) for item in value)
        }
        return {k: v for k, v in given.items() if k not in each}, each

    def _find(self, model: Any) -> str:
        wanted = self.settings.adapter
        known = ", ".join(model.peft_config)
        problems = []
        if wanted is None and len(model.active_adapters) != 1:
            active = ", ".join(model.active_adapters) or "none"
            found = f"the active adapters {active}"
            problems.append(Problem("adapter", found, f"the name of one of {known}"))
        if wanted is not None and wanted not in model.peft_config:
            problems.append(Problem("adapter", repr(wanted), f"one of {known}"))
        if LOADED in model.peft_config:
            expected = "another name, because the merged adapter is called so"
            problems.append(Problem("model", f"an adapter called {LOADED!r}", expected))
        if problems:
            raise ConfigError(problems, SUBJECT)
        name: str = wanted or model.active_adapters[0]
        return name

    def _saved_option(self) -> dict[str, Any]:
        options = self.settings.adapter_options
        return {k: options[k] for k in ("modules_to_save",) if k in options}

    def _merged(
        self, parts: Mapping[str, Weights], method: str, **options: Any
    ) -> tuple[Weights, Mapping[str, Any]]:
        from peft_merge import MergedAdapter, merge_adapters
        from peft_merge.io import state_dict

        merged = merge_adapters(
            {name: _adapter(weights, name) for name, weights in parts.items()},
            method,
            seed=self.settings.seed,
            device=self.settings.device,
            # Heads at different times of one training are heads of one task.
            **{"modules_to_save": "average", **options},
        )
        if not isinstance(merged, MergedAdapter):
            raise MergeError(f"{method} makes several adapters; expected one that makes one.")
        return Weights(state_dict(merged.adapter), merged.adapter.config), merged.report


def _adapter(weights: Weights, name: str) -> Any:
    from peft_merge.io.parse import parse
    from peft_merge.io.tensors import of_memory

    assert weights.config is not None
    adapter, problems = parse(name, weights.config, of_memory(weights.tensors), name)
    if adapter is None or problems:
        raise ConfigError(problems, SUBJECT)
    return adapter


def _for_each(lists: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    return [{name: values[i] for name, values in lists.items()} for i in range(count)]


def _is_ia3(weights: Weights) -> bool:
    return weights.config is not None and weights.config.get("peft_type") == "IA3"
