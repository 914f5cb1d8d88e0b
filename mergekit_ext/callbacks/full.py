"""Snapshots of whole models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.callbacks.kinds import Kind, same_randomness
from mergekit_ext.callbacks.merged import save_full
from mergekit_ext.callbacks.processes import is_main, send, unwrapped
from mergekit_ext.callbacks.settings import SUBJECT
from mergekit_ext.callbacks.weights import Weights, untied
from mergekit_ext.errors import ConfigError, Problem
from mergekit_ext.kernels.numerics import compute_dtype


class FullWeights(Kind):
    """All parameters and buffers that the model would save."""

    def view(self, model: Any) -> Weights:
        """See `Kind.view`."""
        state = _state(model)
        names = untied(state)
        return Weights({name: tensor for name, tensor in state.items() if names[name] == name})

    @property
    def needs_base(self) -> bool:
        """See `Kind.needs_base`."""
        if self.settings.running is not None:
            return False
        from mergekit_ext.host import state_dicts

        known = self.settings.method in state_dicts.known_methods()
        return known and state_dicts.needs_base(self.settings.method)

    def problems(self, weights: Weights, count: int, has_base: bool) -> Iterable[Problem]:
        """See `Kind.problems`."""
        if self.settings.adapter is not None or self.settings.adapter_options:
            found = "options of adapters, with a model that has none"
            yield Problem("adapter, adapter_options", found, "a PeftModel", "Leave them out.")
        if self.settings.running is not None:
            return
        from mergekit_ext.host import state_dicts

        method = self.settings.method
        if method not in state_dicts.known_methods():
            expected = "a method of mergekit, for a model without adapters"
            yield Problem("method", f"{method!r}, which merges adapters", expected)
            return
        yield from state_dicts.problems(method, self.settings.parameters, count, has_base)

    def merge(
        self, snapshots: Mapping[int, Weights], base: Weights | None
    ) -> tuple[Weights, Mapping[str, Any]]:
        """See `Kind.merge`."""
        from mergekit_ext.host import state_dicts

        settings = self.settings
        last = list(snapshots.values())[-1]
        if base is not None and (problems := [*_unlike(last, base)]):
            raise ConfigError(problems, SUBJECT)
        with same_randomness(settings.seed):
            merged = state_dicts.merge(
                settings.method,
                {f"step-{step}": weights.tensors for step, weights in snapshots.items()},
                None if base is None else base.tensors,
                settings.parameters,
                device=settings.device,
                callbacks=settings.callbacks,
            )
        return Weights(merged, None, last.folder), {}

    def blend(self, mean: Weights | None, new: Weights, weight: float) -> Weights:
        """See `Kind.blend`; what is not floating point is taken from `new`."""
        result: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in new.tensors.items():
                if not tensor.is_floating_point():
                    result[name] = tensor.detach().to("cpu", copy=True)
                    continue
                wide = tensor.detach().to("cpu", compute_dtype([tensor]), copy=mean is None)
                result[name] = wide if mean is None else mean.tensors[name].lerp_(wide, weight)
        return Weights(result, None, new.folder)

    def finished(self, mean: Weights, like: Mapping[str, str]) -> Weights:
        """See `Kind.finished`."""
        tensors = {k: t.to(getattr(torch, like[k]), copy=True) for k, t in mean.tensors.items()}
        return Weights(tensors, None, mean.folder)

    @contextmanager
    def applied(self, model: Any, weights: Weights) -> Iterator[None]:
        """See `Kind.applied`."""
        before = {k: t.clone() for k, t in self.view(model).tensors.items()}
        try:
            self.apply(model, weights)
            yield
        finally:
            _copy(_state(model), before)

    def apply(self, model: Any, weights: Weights) -> None:
        """See `Kind.apply`."""
        state = _state(model)
        tensors = _named_like(unwrapped(model), state, weights)
        names = untied(state)
        left = sorted(set(names.values()) - {names[k] for k in tensors if k in names})
        strange = sorted(tensors.keys() - state.keys())
        if left or strange:
            found = f"no weights for {left[:3]}" if left else f"no place for {strange[:3]}"
            raise ConfigError([Problem("model", found, "the model that was trained")], SUBJECT)
        _copy(state, tensors)

    def share(self, model: Any, weights: Weights | None) -> None:
        """See `Kind.share`."""
        if is_main() and weights is not None:
            self.apply(model, weights)
        send(dict(self.view(model).tensors))


def _state(model: Any) -> dict[str, Tensor]:
    state = unwrapped(model).state_dict()
    return {k: t.detach() for k, t in state.items() if isinstance(t, Tensor)}


def _copy(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name in tensors:
            state[name].copy_(tensors[name])


def _named_like(model: Any, state: Mapping[str, Tensor], weights: Weights) -> Mapping[str, Tensor]:
    """Tensors by the names of the live model; transformers may save them under others."""
    if weights.tensors.keys() <= state.keys() or weights.folder is None:
        return weights.tensors
    if not hasattr(type(model), "from_pretrained"):
        return weights.tensors
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "merged"
        save_full(weights, folder)
        loaded: dict[str, Tensor] = type(model).from_pretrained(folder).state_dict()
    return loaded


def _unlike(snapshot: Weights, base: Weights) -> Iterable[Problem]:
    """Where a base is not of the snapshots' model."""
    lacking = [k for k, t in snapshot.tensors.items() if t.is_floating_point()]
    lacking = [k for k in lacking if k not in base.tensors]
    if lacking:
        found = f"no tensor {lacking[0]}" + (f", and {len(lacking) - 1} more" * (len(lacking) > 1))
        remedy = "Give `base` the folder of the initial model, saved as the checkpoints are."
        yield Problem("base", found, "the tensors of the snapshots", remedy)
        return
    for key, tensor in snapshot.tensors.items():
        if tensor.is_floating_point() and base.tensors[key].shape != tensor.shape:
            found = f"{key} of shape {tuple(base.tensors[key].shape)}"
            yield Problem("base", found, f"the snapshots' {tuple(tensor.shape)}")
