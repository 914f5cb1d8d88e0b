"""Snapshots of the adapter of a PeftModel; merged as changes, never A and B apart."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_ext.callbacks.kinds import Kind
from mergekit_ext.callbacks.processes import agree, is_main, unwrapped
from mergekit_ext.callbacks.settings import SUBJECT
from mergekit_ext.callbacks.weights import Weights, write
from mergekit_ext.errors import ConfigError, MergeError, Problem

# The adapter that merged weights become in the live model.
LOADED = "merged"
# What they are while they are evaluated.
_CANDIDATE = "merged_candidate"


class AdapterWeights(Kind):
    """One adapter: its factors or vectors, and the whole tensors that it carries."""

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
        from peft_merge.config.request import Input, Request
        from peft_merge.rules.base import rules

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
        request = Request(
            method="linear" if settings.running else settings.method,
            inputs=(Input("adapter", _adapter(weights, "snapshot")),),
            parameters={} if settings.running else settings.parameters,
            seed=settings.seed,
            device=settings.device,
            subject=SUBJECT,
            **settings.adapter_options,
        )
        try:
            checked(request)
        except ConfigError as error:
            yield from error.problems

    def merge(
        self, snapshots: Mapping[int, Weights], base: Weights | None
    ) -> tuple[Weights, Mapping[str, Any]]:
        """See `Kind.merge`."""
        settings = self.settings
        return self._merged(
            {f"step-{step}": weights for step, weights in snapshots.items()},
            settings.method,
            parameters=settings.parameters,
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
        factors = [dtype for name, dtype in like.items() if "lora_" in name or "ia3_" in name]
        options = {"dtype": (factors or list(like.values()))[0], **self.settings.adapter_options}
        merged, _ = self._merged({"mean": mean}, "linear", **options)
        return merged

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
        if not hasattr(self, "_trained"):
            self._trained = self._find(model)
        return self._trained

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
            **options,
        )
        if not isinstance(merged, MergedAdapter):
            raise MergeError(f"{method} makes several adapters; expected one that makes one.")
        return Weights(state_dict(merged.adapter), merged.adapter.config), merged.report


def _adapter(weights: Weights, name: str) -> Any:
    from peft_merge.io.parse import parse
    from peft_merge.io.tensors import Memory

    assert weights.config is not None
    adapter, problems = parse(name, weights.config, Memory(dict(weights.tensors)), name)
    if adapter is None or problems:
        raise ConfigError(problems, SUBJECT)
    return adapter


def _is_ia3(weights: Weights) -> bool:
    return weights.config is not None and weights.config.get("peft_type") == "IA3"
