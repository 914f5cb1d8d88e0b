"""What a merge of snapshots gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ext.callbacks.weights import Weights, untied, write


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
        """
        target = Path(path)
        if target.exists():
            raise FileExistsError(f"{target}: expected a folder that does not exist yet.")
        if self.weights.config is not None or model is None:
            save_full(self.weights, target)
            return
        from mergekit_ext.callbacks.processes import unwrapped

        inner = unwrapped(model)
        if not hasattr(inner, "save_pretrained"):
            save_full(self.weights, target)
            return
        inner.save_pretrained(target, state_dict=_with_ties(inner, self.weights.tensors))


def save_full(weights: Weights, target: Path) -> None:
    """Write weights, and the configuration of the folder that they come from beside them."""
    write(weights, target)
    if weights.folder is None:
        return
    for file in (*weights.folder.glob("*.json"), *weights.folder.glob("*.model")):
        # The index of a sharded checkpoint names files that are not there.
        wanted = not file.name.endswith((".index.json", "trainer_state.json"))
        if wanted and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _with_ties(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = untied({k: t for k, t in model.state_dict().items() if isinstance(t, Tensor)})
    return {name: tensors[first] for name, first in names.items() if first in tensors}
