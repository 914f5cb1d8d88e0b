"""What a merge of snapshots gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.callbacks.weights import Weights, fill, renamed

# Configurations, tokenizers, templates; not the state of a training.
_BESIDE = {".json", ".model", ".txt", ".jinja"}
_NOT_BESIDE = (".index.json", "trainer_state.json")


@dataclass(frozen=True)
class Merged:
    """Merged weights, and how they came about.

    Attributes:
        step: the last snapshot's.
        steps: of the snapshots that were merged; for `average` and `ema` of all that went in.
        method: as it was asked for.
        weights: the result, on the CPU: ``weights.tensors`` by name (tied ones once);
            ``weights.config`` is the configuration if it is an adapter, else None.
        report: what the method reports; for adapters as in merge_report.json.
        scores: of the merged weights, if they were evaluated.
        before: of the model's own weights at that time.
        loaded: whether the merged weights were put into the model.
    """

    step: int
    steps: tuple[int, ...]
    method: str
    weights: Weights
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    scores: Mapping[str, float] | None = None
    before: Mapping[str, float] | None = None
    loaded: bool = False

    def save(self, path: str | os.PathLike[str], model: Any = None) -> None:
        """Write the weights into a folder.

        An adapter becomes a folder that PEFT loads. A whole model becomes `model.safetensors`;
        with its configuration if the model is one of transformers' and given, or if the snapshots
        were saved folders.

        Raises:
            FileExistsError: there is something at `path` already.
        ConfigError: `model` is another one than that which was trained.
        """
        from mergekit_ext.io.staging import staged

        target = Path(path)
        if target.exists():
            raise FileExistsError(f"{target}: expected a folder that does not exist yet.")
        with staged(target) as staging:
            self._fill(staging.output, model)

    def _fill(self, folder: Path, model: Any) -> None:
        from mergekit_ext.callbacks.processes import unwrapped

        inner: Any = None
        if model is not None and self.weights.config is None:
            inner = unwrapped(model)
        if hasattr(inner, "save_pretrained"):
            state = {k: t for k, t in inner.state_dict().items() if isinstance(t, Tensor)}
            # Saved checkpoints may have other names, and bring a configuration.
            if self.weights.folder is None or self.weights.tensors.keys() <= state.keys():
                inner.save_pretrained(folder, state_dict=renamed(self.weights.tensors, state))
                return
        fill_with_configuration(folder, self.weights)


def fill_with_configuration(folder: Path, weights: Weights) -> None:
    """Write weights into a new folder, and what stands beside those that they come from."""
    fill(folder, weights)
    if weights.folder is None:
        return
    for file in sorted(weights.folder.iterdir()):
        # The index of a sharded checkpoint names files that are not there.
        wanted = file.suffix in _BESIDE and not file.name.endswith(_NOT_BESIDE)
        if wanted and file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
