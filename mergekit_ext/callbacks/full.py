"""Snapshots of whole models: folders that transformers reads, merged by `mergekit_ext.merge`."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergekit_ext
from mergekit_ext.callbacks.settings import INITIAL, Mean, Settings
from mergekit_ext.errors import ConfigError, Problem, listing
from mergekit_ext.io.state import named
from mergekit_ext.kernels.numerics import compute_dtype, finite

_WEIGHTS = "model.safetensors"


class FullModel:
    """A model of transformers; for running means any module of torch."""

    base: Path | None

    def __init__(self, settings: Settings, initial: Path):
        from mergekit_ext.host.run import needs_base

        self._settings = settings
        self.base = None if settings.base is None else Path(settings.base)
        required = settings.base is None and not settings.running and needs_base(settings.method)
        if required or str(settings.base) == INITIAL:
            self.base = initial

    def problems(self, model: Any) -> Iterable[Problem]:
        """Yield why snapshots of a model cannot be taken, whatever the method is."""
        given = self._settings
        if given.adapter is not None or given.adapter_options:
            found = "options of adapters, with a model that has none"
            yield Problem("adapter, adapter_options", found, "a PeftModel", "Leave them out.")
        if given.running is None and not hasattr(model, "save_pretrained"):
            remedy = "Use `average` or `ema`, which take any module."
            yield Problem("model", f"a {type(model).__name__}", "a model of transformers", remedy)

    def save(self, model: Any, folder: Path) -> None:
        """Write the model into an empty folder; refuse NaN and infinity."""
        _finite(model)
        # Names of the live model are merged in more cases than those of checkpoints, which are
        # only checked here.
        model.save_pretrained(folder, save_original_format=self._settings.on == "save")

    def merge_problems(self, folders: Mapping[int, Path], base: Path | None) -> Sequence[Problem]:
        """Return what is wrong with a merge of folders, from configurations and headers."""
        with _randomness_kept():
            return mergekit_ext.check(*self._prepared(folders, base)).problems

    def merge(self, folders: Mapping[int, Path], base: Path | None, out: Path) -> None:
        with _randomness_kept():
            config, options = self._prepared(folders, base)
            mergekit_ext.merge(config, out, options, callbacks=self._settings.callbacks)

    def load(self, model: Any, folder: Path) -> None:
        """Put the weights in a folder into the model."""
        if hasattr(model, "save_pretrained"):
            with _randomness_kept():
                model.load_state_dict(type(model).from_pretrained(folder).state_dict())
        else:
            found = load_file(folder / _WEIGHTS)
            tied = {name: found[kept] for name, (kept, _) in named(model).items() if kept in found}
            model.load_state_dict(found | tied)

    @contextmanager
    def loaded(self, model: Any, folder: Path) -> Iterator[None]:
        """Put the weights in a folder into the model for a while."""
        # On the CPU: an accelerator may be full.
        before = {name: t.to("cpu", copy=True) for name, t in _tensors(model).items()}
        try:
            self.load(model, folder)
            yield
        finally:
            model.load_state_dict(before, strict=False)  # tied weights are there once

    def blend(self, mean: Mean | None, model: Any, weight: float) -> Mean:
        """Return ``mean + weight * (model - mean)`` in float32 at least.

        What is not floating point comes from the model.
        """
        found = _finite(model)
        tensors = {} if mean is None else mean.tensors
        if mean is not None:
            _require_alike(found, tensors)
        for name, tensor in found.items():
            if not tensor.is_floating_point():
                tensors[name] = tensor.to("cpu", copy=True)
                continue
            wide = tensor.to("cpu", compute_dtype([tensor]), copy=True)
            # A new tensor: the old one may be part of a saved state.
            tensors[name] = wide if mean is None else tensors[name].lerp(wide, weight)
        return Mean(tensors=tensors)

    def save_mean(self, mean: Mean, model: Any, out: Path) -> None:
        """Write a mean into an empty folder, in the dtypes of the model."""
        found = _tensors(model)
        _require_alike(found, mean.tensors)
        tensors = {name: mean.tensors[name].to(found[name].dtype) for name in found}
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(out, state_dict=tensors, save_original_format=False)
        else:
            save_file(tensors, out / _WEIGHTS, {"format": "pt"})

    def _prepared(self, folders: Mapping[int, Path], base: Path | None) -> tuple[Any, Any]:
        from mergekit_ext.host.run import snapshot_merge

        own, models = self._settings, [*folders.values()]
        return snapshot_merge(own.method, models, base, own.parameters, own.device, own.seed)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return all that the model would save, tied weights once, under their first name."""
    return {name: tensor for name, (kept, tensor) in named(model).items() if kept == name}


def _finite(model: Any) -> dict[str, Tensor]:
    found = _tensors(model)
    for name, tensor in found.items():
        finite(tensor, name, "")
    return found


def _require_alike(found: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> None:
    live, kept = ({name: t.shape for name, t in of.items()}.items() for of in (found, mean))
    if differ := sorted({name for name, _ in live ^ kept}):
        text = f"{listing(differ)}, which are new, missing or of another shape"
        expected = "the tensors of the snapshots before"
        raise ConfigError([Problem("model", text, expected)], "the running mean")


@contextmanager
def _randomness_kept() -> Iterator[None]:
    import numpy

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
