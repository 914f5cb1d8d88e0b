"""A plain loop over safetensors with the arithmetic of `nan` and `nan_ties`: a floor to measure by.

    python -m bench.plain CONFIG OUT

No checks, nothing staged or resumed, no report: each tensor of the base and the models is read,
merged in float32 and kept, and one file is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def coefficients(changes: list[Tensor]) -> list[float]:
    """Return NAN's coefficients, of sums of squares in float64 over rows."""
    norms = [
        float(torch.linalg.vector_norm(c.view(-1, c.shape[-1]), dim=-1).double().norm())
        for c in changes
    ]
    total = sum(1 / norm for norm in norms)
    return [1 / norm / total for norm in norms]


def ties(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Return the mean of what agrees with the elected sign, each trimmed to its largest entries."""
    kept = []
    for change, weight in zip(changes, weights, strict=True):
        count = max(1, int(density * change.numel()))
        magnitude = change.abs()
        least = magnitude.view(-1).kthvalue(change.numel() - count + 1).values
        kept.append(torch.where(magnitude >= least, change, 0.0).mul_(weight))
    elected = sum(kept[1:], kept[0].clone()).sign_()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for change, weight in zip(kept, weights, strict=True):
        agrees = change.sign() == elected
        total += change * agrees
        mass += weight * agrees
    return total / torch.where(mass == 0, 1.0, mass)


def main(config: str, out: str) -> None:
    """Merge as the configuration says, which is one of `bench.merge`."""
    document = yaml.safe_load(Path(config).read_text())
    density = document["models"][0].get("parameters", {}).get("density")
    folders = [document["base_model"], *(model["model"] for model in document["models"])]
    files = [safe_open(Path(folder) / "model.safetensors", framework="pt") for folder in folders]
    merged = {}
    for name in files[0].keys():  # noqa: SIM118
        base, *models = (file.get_tensor(name) for file in files)
        start = base.float()
        changes = [model.float() - start for model in models]
        weights, scale = coefficients(changes), max(1.0, len(changes) / 2)
        if density is not None:
            change = ties(changes, weights, density)
        else:
            change = sum(w * c for w, c in zip(weights, changes, strict=True))
        merged[name] = start.add_(change, alpha=scale).to(base.dtype)
    Path(out).mkdir()
    save_file(merged, Path(out) / "model.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
