"""Averages that are kept while training, without the snapshots: uniform and exponential.

Each is a weighted mean in one pass: ``mean += weight(n) * (n-th snapshot - mean)``, n from 1.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class Average(BaseModel):
    """The uniform mean."""

    model_config = _STRICT

    def weight(self, n: int) -> float:
        """Return the weight of the n-th snapshot."""
        return 1 / n


class Ema(BaseModel):
    """The exponential moving mean: of n snapshots the i-th has d^(n-i) (1-d) / (1-d^n), d `decay`.

    So the mean starts at zero and is divided by the sum of its weights, as Adam does it. Without
    the correction it starts at the first snapshot, which keeps the weight d^(n-1): after n = 100
    snapshots and d = 0.999 that is 0.9 of the mean for a model that had hardly been trained.
    """

    model_config = _STRICT

    decay: float = Field(0.999, ge=0, lt=1)
    bias_correction: bool = True

    def weight(self, n: int) -> float:
        """Return the weight of the n-th snapshot."""
        if n == 1:
            return 1.0
        return (1 - self.decay) / (1 - self.decay**n if self.bias_correction else 1)


RUNNING: dict[str, type[Average] | type[Ema]] = {"average": Average, "ema": Ema}
