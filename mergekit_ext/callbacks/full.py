"""Snapshots of whole models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ext.callbacks.kinds import Kind, Shape, same_randomness
from mergekit_ext.callbacks.merged import fill_with_configuration
from mergekit_ext.callbacks.processes import agree, send, unwrapped
from mergekit_ext.callbacks.weights import Weights, copied, renamed, untied
from mergekit_ext.errors import Problem
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

    def unlike(self, weights: Weights, first: Mapping[str, Shape]) -> Iterable[Problem]:
        """See `Kind.unlike`."""
        shapes = weights.shapes
        if differ := sorted(first.keys() ^ shapes.keys()):
            found = f"{'a new' if differ[0] in shapes else 'no'} tensor {differ[0]}"
            more = f", and {len(differ) - 1} more differences" * (len(differ) > 1)
            yield Problem("model", found + more, "the tensors of the first snapshot")
        for name in first.keys() & shapes.keys():
            if first[name] != shapes[name]:
                yield Problem(
                    "model",
                    f"{name} of shape {shapes[name]}",
                    f"the first snapshot's {first[name]}",
                )

    def unlike_base(self, weights: Weights, base: Weights) -> Iterable[Problem]:
        """See `Kind.unlike_base`."""
        given = base.shapes
        wanted = {k: s for k, s in weights.shapes.items() if weights.tensors[k].is_floating_point()}
        if lacking := [name for name in wanted if name not in given]:
            more = f", and {len(lacking) - 1} more" * (len(lacking) > 1)
            remedy = "Give `base` the folder of the initial model, saved as the checkpoints are."
            expected = "the tensors of the snapshots"
            yield Problem("base", f"no tensor {lacking[0]}{more}", expected, remedy)
        for name, shape in wanted.items():
            if given.get(name, shape) != shape:
                yield Problem("base", f"{name} of shape {given[name]}", f"the snapshots' {shape}")

    def saved(self, checkpoint: Path) -> Path:
        """See `Kind.saved`."""
        return checkpoint

    def merge(
        self, snapshots: Mapping[int, Weights], base: Weights | None
    ) -> tuple[Weights, Mapping[str, Any]]:
        """See `Kind.merge`."""
        from mergekit_ext.host import state_dicts

        settings = self.settings
        last = list(snapshots.values())[-1]
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
        before = copied(self.view(model)).tensors  # on the CPU: an accelerator may be full
        try:
            self.apply(model, weights)
            yield
        finally:
            _copy(_state(model), before)

    def apply(self, model: Any, weights: Weights) -> None:
        """See `Kind.apply`."""
        state = _state(model)
        _copy(state, renamed(_named_like(unwrapped(model), state, weights), state))

    def share(self, model: Any, weights: Weights | None) -> None:
        """See `Kind.share`."""
        error: Exception | None = None
        if weights is not None:
            try:
                self.apply(model, weights)
            except Exception as raised:
                error = raised
        agree(None, error)
        if error is not None:
            raise error
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
        fill_with_configuration(folder, weights)
        loaded: dict[str, Tensor] = type(model).from_pretrained(folder).state_dict()
    return loaded
