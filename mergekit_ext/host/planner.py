"""mergekit's planner, with the statistics graph before the merge graph, and planned files.

The weights of a merge are written into planned files, which become a checkpoint; mergekit's
`TensorWriter` would hold whole shards in memory.
"""

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.declared import Inputs
from mergekit_ext.events import MergeBegin
from mergekit_ext.host import session as sessions
from mergekit_ext.host.architecture import settled
from mergekit_ext.host.method import ExtMethod, ext_method
from mergekit_ext.host.session import Session, TensorRecord
from mergekit_ext.host.tasks import MergeTensorTask, with_statistics
from mergekit_ext.io import planned_files
from mergekit_ext.io.headers import TensorHeader
from mergekit_ext.io.journal import Finished
from mergekit_ext.io.planned_files import PlannedFile, PlannedFiles, split, weight_names

# The kind of line in the journal.
_LINE = "tensor"


def extended(stock: type) -> type:
    """A subclass of mergekit's ``MergePlanner`` that measures before it hands out a plan.

    It is made from `stock` because ``mergekit.plan`` is still being imported when this is needed.
    Plans for mergekit's own methods are left as they are outside of a session.
    """

    class MergePlanner(stock):
        _tensors: list[Any]

        def plan_tensor(
            self, weight: Any, weights_in: list[Any], models: list[Any], cfg_reader: Any
        ) -> None:
            """Plan a tensor, or the copy of one."""
            # mergekit adds a list to the aliases of an optional one, a tuple.
            if weight.optional:
                weights_in = [
                    w.model_copy(update={"aliases": _Aliases(w.aliases)}) if w.aliases else w
                    for w in weights_in
                ]
            before = len(self._tensors)
            super().plan_tensor(weight, weights_in, models, cfg_reader)
            giver = settled().copied.get(weight.name)
            if giver is not None and len(self._tensors) > before:
                _, task = self._tensors.pop()
                self._tensors.append((weight, MergeTensorTask.copying(task, giver)))

        def _plan(self) -> None:
            """Plan what this process merges: nothing that is finished, or that others do."""
            super()._plan()
            method, running = ext_method(self._method.spec.name), sessions.current()
            if method is None and running is None:
                return
            session, processes = running or Session(), parallel.current()
            # Of two tensors of one name the last counts, as in mergekit.
            tensors = {weight.name: (weight, task) for weight, task in self._tensors}
            session.order = list(tensors)
            if session.journal is not None:
                entries = {name: session.predicted.get(name) for name in tensors}
                session.writer = PlannedWriter(session, entries, self.options.out_shard_size)
            finished = session.writer.finished if session.writer else frozenset()
            if finished:
                done = f"{len(finished)} of {len(tensors)} tensors"
                session.say(f"Going on with a merge that was stopped: {done}.")
            if method is not None:
                tasks = [task for _, task in tensors.values()]
                _forewarn(method, (t for t in tasks if not getattr(t, "copies", False)), session)
            models = tuple(map(str, self.config.referenced_models()))
            left = [name for name in tensors if name not in finished]
            work = {name: session.work_of(name) for name in left}
            name = self._method.spec.name
            session.emit(MergeBegin(name, session.output, models, len(left), work=work))
            # Cast once: a half-precision result would be rounded before a wider out_dtype.
            seed, dtype = self.options.random_seed, self.config.out_dtype
            tasks = [
                MergeTensorTask.of(task, seed, out_dtype=weight.force_dtype or dtype)
                for weight, task in tensors.values()
            ]
            prepared = dict(zip(tensors, with_statistics(tasks, self.options), strict=True))
            own = processes.own(left, session.work_of)
            self._tensors = [(tensors[name][0], prepared[name]) for name in own]

    return MergePlanner


class _Aliases(tuple[str, ...]):
    def __radd__(self, other: list[str]) -> list[str]:
        return [*other, *self]


def _forewarn(method: ExtMethod, tasks: Iterable[Any], session: Session) -> None:
    for task in tasks:
        # Norm and head of a merge of slices have the parameters of one slice's models only.
        weights = [
            task.input_parameters[model]["weight"]
            for model in task.model_order
            if model != task.base_model and model in task.input_parameters
        ]
        inputs = Inputs(len(weights), task.base_model is not None, weights=weights)
        session.warn(method.declared.forewarn(dict(task.parameters.items()), inputs))


def writer(stock: Callable[..., Any], self: Any, **arguments: Any) -> Any:
    """Extend ``TensorWriterTask.execute``: the writer of the running merge, if it has one."""
    session = sessions.current()
    return (session and session.writer) or stock(self, **arguments)


class PlannedWriter:
    """The weights of one output, each written when it is merged; every process has one.

    A tensor that no header predicts has a file of its own, so that the layout does not depend on
    the order of the work. All processes write into the main one's folder.

    Args:
        session: gets the records of tensors that are finished already, and of other processes.
        entries: the tensors of the output in their order; None for what no header predicts.
        limit: bytes of one file; 0 for a single one.

    Attributes:
        finished: names of tensors that an earlier merge has written, and that are as it left them.
    """

    def __init__(self, session: Session, entries: Mapping[str, TensorHeader | None], limit: int):
        assert session.staging is not None
        self._folder, self._session, self._entries = session.staging.output, session, entries
        self._finished = Finished(session.journal)
        self._files = PlannedFiles(self._folder)
        self._lock = threading.Lock()
        self._placed: dict[str, tuple[str, TensorHeader]] = {}
        cuts = split([entry for entry in entries.values() if entry is not None], limit)
        alone = [name for name, entry in entries.items() if entry is None]
        paths = weight_names(len(cuts) + len(alone))
        self._planned = [PlannedFile(path, cut) for path, cut in zip(paths, cuts, strict=False)]
        self._plan = {entry.name: file for file in self._planned for entry in file.entries}
        self._alone = dict(zip(alone, paths[len(cuts) :], strict=True))
        self.finished = self._continued()

    def save_tensor(self, name: str, tensor: Tensor, clone: bool = False) -> None:
        """Write a merged tensor, and a line. `clone` is for writers that keep what they get."""
        entry = TensorHeader.of(name, tensor.dtype, tensor.shape)
        record = self._session.recorded.get(name)
        details = None if record is None else dict(record.details)
        # Threads of several GPUs come here: each copies and sums up by itself.
        data = planned_files.as_bytes(tensor)
        line = [zlib.crc32(data), entry.dtype, entry.shape, entry.nbytes, details]
        with self._lock:
            file = self._file(entry)
            if file is not self._plan.get(name):
                self._files.create([file])
            self._files.put(file, name, data)
            self._finished.add(_LINE, name, line)
            self._placed[name] = file.path, entry

    def finalize(self) -> None:
        """When all processes are done: give the main one all records, and finish the files."""
        self._files.close()
        processes, recorded = parallel.current(), self._session.recorded
        records = [recorded[name] for name in self._placed if name in recorded]
        placed: dict[str, tuple[str, TensorHeader]] = {}
        for files, found in processes.gather((self._placed, records)):
            placed |= files
            for record in found:
                self._session.record(record)
        self._session.relay()
        if processes.is_main:
            self._complete({name: placed[name] for name in self._entries if name in placed})
        processes.wait()

    def _complete(self, placed: Mapping[str, tuple[str, TensorHeader]]) -> None:
        """Make a checkpoint of the files, from where each tensor is, in the order of the output."""
        kept = [_without_holes(self._folder, file, placed) for file in self._planned]
        files = [file for file in kept if file.entries]
        paths = {file.path for file in self._planned}
        files += [PlannedFile(path, (e,)) for path, e in placed.values() if path not in paths]
        final = weight_names(len(files))
        if [file.path for file in files] != final:
            # Twice, because a file may get the name of another.
            for step in ([f"moving-{name}" for name in final], final):
                for file, name in zip(files, step, strict=True):
                    (self._folder / file.path).rename(self._folder / name)
                files = [PlannedFile(n, file.entries) for n, file in zip(step, files, strict=True)]
        if len(files) > 1:
            contents = [(file.path, file.entries) for file in files]
            version = metadata.version("mergekit")
            planned_files.write_index(self._folder, contents, mergekit_version=version)

    def _continued(self) -> frozenset[str]:
        """Return the tensors that are finished, and remove files of none."""
        processes = parallel.current()
        found = {name: self._finished.found(_LINE, name) for name in self._entries}
        lines = {name: line for name, line in found.items() if line is not None}
        claimed = {
            name: self._file(TensorHeader(name, dtype, tuple(shape), nbytes))
            for name, (_, dtype, shape, nbytes, _) in lines.items()
        }
        if processes.is_main:
            files = {file.path: file for file in (*self._planned, *claimed.values())}
            self._files.start(files.values())
        processes.wait()
        for name in processes.own(claimed, lambda name: lines[name][3]):
            if self._files.crc(file := claimed[name], name) == lines[name][0]:
                self._placed[name] = file.path, file.places[name][1]
        finished = frozenset().union(*processes.gather(frozenset(self._placed)))
        for name in finished:
            _, _, shape, _, details = lines[name]
            if details is not None:
                self._session.record(TensorRecord(name, math.prod(shape), details))
        return finished

    def _file(self, entry: TensorHeader) -> PlannedFile:
        """Return the planned file of a tensor, or one of its own if it is not as planned."""
        file = self._plan.get(entry.name)
        if file is not None and file.places[entry.name][1] == entry:
            return file
        number = list(self._entries).index(entry.name)
        return PlannedFile(self._alone.get(entry.name, f"extra-{number}.safetensors"), (entry,))


def _without_holes(
    folder: Path, file: PlannedFile, placed: Mapping[str, tuple[str, TensorHeader]]
) -> PlannedFile:
    """Take out of a file the planned tensors that were not written into it."""
    kept = tuple(entry for entry in file.entries if placed.get(entry.name) == (file.path, entry))
    path = folder / file.path
    if not kept:
        path.unlink()
    elif len(kept) < len(file.entries):
        with safe_open(path, "pt") as stored:
            tensors = {entry.name: stored.get_tensor(entry.name) for entry in kept}
        save_file(tensors, path.with_suffix(".whole"), {"format": "pt"})
        path.with_suffix(".whole").rename(path)
    return PlannedFile(file.path, kept)
