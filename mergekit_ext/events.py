"""What callbacks receive from a merge: events, the callback protocol, ready callbacks.

A callback is any object with some of the methods of `MergeCallback`, or of `Callback`, which has
those of a training too; docs/callbacks.md. An exception raised by a callback stops the merge: that
is the way to cancel it. No Trainer, mergekit or torch is needed.
"""

import dataclasses
import inspect
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

from mergekit_ext.errors import ConfigError, Problem


@dataclasses.dataclass(frozen=True)
class Event:
    """Base class of events."""

    handler: ClassVar[str]  # the callback's method: `on_merge_begin` for `MergeBegin`
    every_process: ClassVar[bool] = False  # whether each process emits its own

    def __init_subclass__(cls) -> None:
        words = re.findall("[A-Z][a-z]*", cls.__name__)
        cls.handler = f"on_{'_'.join(words).lower()}"


@dataclasses.dataclass(frozen=True)
class MergeBegin(Event):
    """The checks have passed and no weight has been read; `tensors` counts in `unit`s.

    `work` measures each of them, in operations or bytes; empty where all count the same.
    """

    method: str
    output: str
    models: tuple[str, ...]
    tensors: int
    unit: str = "tensor"
    work: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StatisticsBegin(Event):
    """A pass over the inputs starts that only measures; `tensors` counts in `unit`s."""

    tensors: int
    unit: str = "tensor"


@dataclasses.dataclass(frozen=True)
class TensorMeasured(Event):
    """One tensor of the statistics pass is done."""

    every_process = True
    name: str


@dataclasses.dataclass(frozen=True)
class StatisticsEnd(Event):
    """The statistics are complete: `coefficients[group][model]`, for each group of tensors."""

    coefficients: Mapping[str, Mapping[str, float]]
    seconds: float


@dataclasses.dataclass(frozen=True)
class SolverIteration(Event):
    """An iterative method has done one iteration on one tensor."""

    every_process = True
    tensor: str
    iteration: int
    objective: float
    change: float


@dataclasses.dataclass(frozen=True)
class TensorMerged(Event):
    """One output tensor is ready. `details` is what the method reports about it."""

    every_process = True
    name: str
    shape: tuple[int, ...]
    details: Mapping[str, Any]
    seconds: float


@dataclasses.dataclass(frozen=True)
class BlockMerged(Event):
    """FlexMerge: a block is done at the size being made. `groups` are the tasks that share it."""

    every_process = True
    name: str
    groups: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class SizeReached(Event):
    """FlexMerge: all blocks are done at one size; `models` and `bytes` are what it takes."""

    algorithm: str
    models: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class ShardWritten(Event):
    """A file of weights is in its place; sent for each when the output is complete."""

    path: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class MergeEnd(Event):
    """The output stands under its final name."""

    output: str
    seconds: float


EVENTS: tuple[type[Event], ...] = tuple(Event.__subclasses__())
MERGE_HOOKS = {kind.handler: ("event",) for kind in EVENTS}
# Of trackers.
LOG_HOOKS = {"log": ("values", "step")}


class MergeCallback:
    """Base class of callbacks: override what you need."""

    def on_merge_begin(self, event: MergeBegin) -> None: ...
    def on_statistics_begin(self, event: StatisticsBegin) -> None: ...
    def on_tensor_measured(self, event: TensorMeasured) -> None: ...
    def on_statistics_end(self, event: StatisticsEnd) -> None: ...
    def on_solver_iteration(self, event: SolverIteration) -> None: ...
    def on_tensor_merged(self, event: TensorMerged) -> None: ...
    def on_block_merged(self, event: BlockMerged) -> None: ...
    def on_size_reached(self, event: SizeReached) -> None: ...
    def on_shard_written(self, event: ShardWritten) -> None: ...
    def on_merge_end(self, event: MergeEnd) -> None: ...

    def close(self) -> None:
        """Called once when the merge is over, also after a failure."""


class Callback(MergeCallback):
    """Base class of callbacks for merges and training: override what you need.

    A callback need not inherit from it: any object with some of the methods will do. In a plain
    loop you call them yourself; in a run of several processes, in each of them.
    """

    def on_train_begin(self, step: int, model: Any) -> None:
        """Before the first step; `step` is 0, or that of the checkpoint that is resumed."""

    def on_step_end(self, step: int, model: Any) -> None:
        """The optimizer has made its `step`-th step (counted from 1) on `model`."""

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """The loop has something to log: losses, learning rates, by name."""

    def on_save(self, step: int, path: str | os.PathLike[str]) -> None:
        """A checkpoint stands complete in the folder `path`."""

    def on_train_end(self, step: int, model: Any) -> None:
        """Training is over; `step` steps were made."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, lists, mappings and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned in an earlier run."""


# The arguments of each method.
TRAINING_HOOKS = {
    name: tuple(inspect.signature(method).parameters)[1:]
    for name, method in vars(Callback).items()
    if name.startswith("on_")
}


def takes(function: Any, *arguments: str) -> bool:
    """Return whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        pass
    return True


# Methods, with their arguments.
Hooks = Mapping[str, Sequence[str]]


def hook_problem(callback: object, hooks: Hooks, where: str) -> Problem | None:
    """Return why an object would never be called by `hooks`, or could not be; None if it can."""
    if isinstance(callback, type):
        name = callback.__name__
        return Problem(where, f"the class {name}", f"an object of it: {name}()")
    if not any(hasattr(callback, hook) for hook in hooks):
        return Problem(where, repr(callback), f"some of the methods {', '.join(hooks)}")
    for hook, arguments in hooks.items():
        if hasattr(callback, hook) and not takes(getattr(callback, hook), *arguments):
            found = f"{type(callback).__name__}.{hook} with other arguments"
            return Problem(where, found, f"{hook}({', '.join(arguments)})")
    return None


def require_hooks(callback: object, hooks: Hooks, where: str) -> None:
    """Raise `TypeError` for what `hook_problem` finds."""
    if problem := hook_problem(callback, hooks, where):
        raise TypeError(str(problem))


class Dispatcher:
    """Sends each event to every callback that has a method for it, one event at a time."""

    def __init__(self, callbacks: Iterable[object] = ()):
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            require_hooks(callback, MERGE_HOOKS, "callbacks")
        # mergekit's multi-GPU executor runs tasks in threads.
        self._lock = threading.RLock()

    def emit(self, event: Event) -> None:
        with self._lock:
            for callback in self._callbacks:
                if handler := getattr(callback, event.handler, None):
                    handler(event)

    def close(self) -> None:
        """Close every callback that can be closed, whatever the others do."""
        with ExitStack() as stack:
            for callback in reversed(self._callbacks):
                if close := getattr(callback, "close", None):
                    stack.callback(close)


@contextmanager
def measuring(
    emit: Callable[[Event], None], count: int, unit: str
) -> Iterator[dict[str, Mapping[str, float]]]:
    """Emit that a pass begins and ends; the coefficients are what is put into the mapping."""
    started, coefficients = time.perf_counter(), dict[str, Mapping[str, float]]()
    emit(StatisticsBegin(count, unit))
    yield coefficients
    emit(StatisticsEnd(coefficients, time.perf_counter() - started))


class ProgressBar(MergeCallback):
    """A tqdm bar for the statistics pass, and one for the merge, which advances by the work."""

    def __init__(self, file: IO[str] | None = None):
        self._file = file
        self._bar: Any = None
        self._merge = MergeBegin("", "", (), 0)

    def _start(self, title: str, event: MergeBegin | StatisticsBegin) -> None:
        import tqdm  # loaded where a bar is shown

        self.close()
        work = getattr(event, "work", {})
        total = sum(work.values())
        self._shares = {name: part / total for name, part in work.items()} if total else {}
        self._done, self._count = 0, event.tensors
        shown = "{desc}: {percentage:3.0f}%|{bar}| {unit} [{elapsed}<{remaining}{postfix}]"
        each = f"0/{event.tensors} {event.unit}s"
        # tqdm redraws at its own pace: a solver may report a thousand times a second.
        self._bar = tqdm.tqdm(
            total=1.0, desc=title, unit=each, bar_format=shown, miniters=0, file=self._file
        )

    def _advance(self, name: str) -> None:
        self._done += 1
        self._bar.unit = f"{self._done}/{self._bar.unit.partition('/')[2]}"
        share = self._shares.get(name, 0.0) if self._shares else 1 / self._count
        self._bar.update(1.0 - self._bar.n if self._done == self._count else share)

    def on_merge_begin(self, event: MergeBegin) -> None:
        self._merge = event

    def on_statistics_begin(self, event: StatisticsBegin) -> None:
        if event.tensors:  # none are left of a merge that goes on
            self._start("Measuring", event)

    def on_tensor_measured(self, event: TensorMeasured) -> None:
        self._advance(event.name)

    def on_statistics_end(self, event: StatisticsEnd | MergeEnd) -> None:
        self.close()

    on_merge_end = on_statistics_end

    def on_solver_iteration(self, event: SolverIteration) -> None:
        bar = self._merging()
        bar.set_postfix_str(f"iteration {event.iteration}", refresh=False)
        bar.update(0)

    def on_tensor_merged(self, event: TensorMerged | BlockMerged) -> None:
        self._merging()
        self._advance(event.name)

    on_block_merged = on_tensor_merged

    def _merging(self) -> Any:
        if self._bar is None:
            self._start(f"Merging ({self._merge.method})", self._merge)
        return self._bar

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLines(MergeCallback):
    """One JSON object per event and line: ``{"event": ..., "time": ..., <the event's fields>}``.

    `target` is a path, which is appended to, or an open text file, which is left open.

    Raises:
        ConfigError: the path cannot be written; `where` names what gave it.
    """

    def __init__(self, target: str | os.PathLike[str] | IO[str], where: str = "target"):
        self._owned = isinstance(target, (str, os.PathLike))
        if isinstance(target, (str, os.PathLike)):
            try:
                target = Path(target).open("a", encoding="utf-8")  # noqa: SIM115 (see `close`)
            except OSError as error:
                found = f"{target} ({error.strerror})"
                raise ConfigError([Problem(where, found, "a file to append to")]) from None
        self._file: IO[str] = target

    def _write(self, event: Event) -> None:
        kind, fields = event.handler.removeprefix("on_"), dataclasses.asdict(event)
        self._file.write(json.dumps({"event": kind, "time": time.time(), **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._owned:
            self._file.close()


for _kind in EVENTS:
    setattr(JsonLines, _kind.handler, JsonLines._write)
