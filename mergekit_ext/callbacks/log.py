"""Merges and training, logged to whatever logs."""

from collections.abc import Callable, Mapping
from typing import Any

from mergekit_ext import events


class LogTo(events.Callback):
    """Logs numbers of merges and of training by calling ``target.log(values, step)``.

    A merge by itself counts its tensors (or blocks) as steps and logs each of them. A merge during
    or after training is logged once, with means, under the step of the training: trackers refuse
    steps that go back.

    Args:
        target: an Accelerator, one of its trackers, or any object with that method.
        values: further numbers to log while training, a function of the step and the model.
        every: `values` is called in each step that is a multiple of it.
        prefix: of the names of merge values.

    Raises:
        TypeError: `target` cannot log.
        ValueError: `every` is less than 1.
    """

    def __init__(
        self,
        target: Any,
        *,
        values: Callable[[int, Any], Mapping[str, float]] | None = None,
        every: int = 1,
        prefix: str = "merge/",
    ):
        events.require_hooks(target, events.LOG_HOOKS, "target")
        if every < 1:
            raise ValueError(f"every: found {every}; expected a number of steps, at least 1.")
        self._target, self._values, self._every, self._prefix = target, values, every, prefix
        self._training: int | None = None
        self._units = 0
        self._gathered: dict[str, list[float]] = {}

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Pass values on as they are: a `LogTo` is a target itself."""
        self._target.log(dict(values), step)

    def at(self, step: int) -> None:
        """Log merges that follow under this step of the training, or a later one."""
        self._training = max(step, self._training or 0)

    def on_train_begin(self, step: int, model: Any) -> None:
        self._training = step

    def on_step_end(self, step: int, model: Any) -> None:
        self._training = step
        if self._values is not None and step % self._every == 0:
            self.log(self._values(step, model), step)

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        self._training = step
        self.log(values, step)

    def on_merge_begin(self, event: events.MergeBegin) -> None:
        self._units, self._gathered = 0, {}

    def on_statistics_end(self, event: events.StatisticsEnd) -> None:
        groups = event.coefficients.items()
        self._emit({f"coefficient/{g}/{m}": v for g, of in groups for m, v in of.items()})

    def on_tensor_merged(self, event: events.TensorMerged) -> None:
        self._units += 1
        numbers = {k: float(v) for k, v in event.details.items() if isinstance(v, (int, float))}
        self._emit({**numbers, "tensor_seconds": event.seconds})

    def on_block_merged(self, event: events.BlockMerged) -> None:
        self._units += 1
        self._emit({"groups": len(event.groups)})

    def on_size_reached(self, event: events.SizeReached) -> None:
        self._emit({"models": event.models, "bytes": event.bytes})

    def on_merge_end(self, event: events.MergeEnd) -> None:
        values = {k: sum(found) / len(found) for k, found in self._gathered.items()}
        self._gathered = {}
        self._send({**values, "units": self._units, "seconds": event.seconds})

    def _emit(self, values: Mapping[str, float]) -> None:
        if self._training is None:
            self._send(values)
        else:
            for name, value in values.items():
                self._gathered.setdefault(name, []).append(value)

    def _send(self, values: Mapping[str, float]) -> None:
        if values:
            step = self._units if self._training is None else self._training
            self.log({f"{self._prefix}{name}": value for name, value in values.items()}, step)
