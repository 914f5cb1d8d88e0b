"""Merge the groups of blocks: for files, or in memory at one size after the other.

What is made is what `storage.stored` lists, in its order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ext.declared.method import factor_in
from mergekit_ext.errors import MergeError
from mergekit_ext.flexmerge.algorithm import Algorithm, Masked
from mergekit_ext.flexmerge.decomposition import Decomposition
from mergekit_ext.flexmerge.layout import BlockLayout, Part
from mergekit_ext.flexmerge.plan import Plan
from mergekit_ext.flexmerge.source import BlockData, BlockReader
from mergekit_ext.flexmerge.stored import FACTOR_ENDS, Place, StoredGroup, sources, stored
from mergekit_ext.kernels.calibration import distance, norms_of
from mergekit_ext.kernels.numerics import all_finite, count_non_finite, finite
from mergekit_ext.report.rho import Distance

_Stored = Iterator[tuple[Place, str, Tensor]]
_Read = Callable[[int, str], Tensor]
# Below this share of a dtype's largest value no rounding leads out of its range.
_SAFE_RANGE = 0.9


def require_in_range(tensor: Tensor, name: str) -> None:
    """Raise `MergeError` if a merged tensor left the range of its dtype."""
    if not all_finite(tensor):
        count = count_non_finite(tensor)
        raise MergeError(
            f"{name}: {count} of {tensor.numel()} merged values are not finite in {tensor.dtype}, "
            "although all inputs are; expected values inside of its range. Choose a wider "
            "`dtype`, or smaller `lambda` and `weight`."
        )


@dataclass(frozen=True)
class Merging:
    """How the members of a group become what is stored, in the dtype `forced` if one is asked.

    Groups that store residuals take them from `residuals`.
    """

    algorithm: Algorithm
    forced: torch.dtype | None = None
    residuals: Decomposition | None = None


def block_tensors(
    reader: BlockReader,
    block: BlockLayout,
    groups: Sequence[StoredGroup],
    merging: Merging,
    own: _Read,
    rescale: dict[int, float],
    distances: list[Distance] | None = None,
) -> _Stored:
    """Yield what is stored of some groups of a block: its place, its name, and the tensor.

    The base's tensors lie in the reader's memory. `own` returns a tensor, or its bytes, as a task's
    model stores it; `rescale` receives the rescaler of each task whose group is masked, and
    `distances` how far each dense group of several tasks went.
    """
    forced, algorithm = merging.forced, merging.algorithm
    merged = [group for group in groups if len(group.tasks) > 1 and group.kind != "residual"]
    shared = [task for group in merged for task in group.tasks]
    data = reader.read(block, shared) if shared else None
    if data is not None and any(group.kind == "masked" for group in groups):
        for index, part in enumerate(block.parts):
            base = data.part(data.base, index).to("cpu", part.base_dtype)
            yield Place("base", ()), part.name, base
    for group in groups:
        if len(group.tasks) == 1:
            (task,) = group.tasks
            for part in block.parts:
                yield _own(own, task, part, forced)
            continue
        if group.kind == "residual":
            yield from _residual(block, group, merging, own)
            continue
        assert data is not None
        members = (data, group.tasks, forced or block.dtype(group.tasks))
        if group.kind == "dense":
            vector = algorithm.merge(*members)
            if distances is not None:
                names = [reader.layout.tasks[task] for task in group.tasks]
                models = [data.models[task] for task in group.tasks]
                length, *norms = norms_of([vector, *models], data.base)
                inputs, options = dict(zip(names, norms, strict=True)), algorithm.parameters.shared
                factor = {name: options.get(name) for name in (factor_in(options),)}
                distances += distance(length, inputs, factor, algorithm.orthogonal).values()
            yield from _parts(Place("dense", group.tasks), block, vector, forced)
            continue
        found = algorithm.merge_masked(*members)
        _require_reconstructible(group, found, data, forced)
        yield from _parts(Place("unified", group.tasks), block, found.unified, forced)
        for task in group.tasks:
            yield Place("masks", (task,)), block.name, found.masks[task].cpu()
        rescale.update(found.rescale)


def _own(
    own: _Read, task: int, part: Part, forced: torch.dtype | None
) -> tuple[Place, str, Tensor]:
    tensor, dtype = own(task, part.name), part.dtypes[task]
    if forced not in (None, dtype):
        tensor = tensor.view(dtype).to(forced)
        require_in_range(tensor, part.name)
    return Place("dense", (task,)), part.name, tensor


def _residual(block: BlockLayout, group: StoredGroup, merging: Merging, own: _Read) -> _Stored:
    found, tasks = merging.residuals, group.tasks
    assert found is not None
    for part in block.parts:
        if part.name in group.own:
            for task in tasks:
                yield _own(own, task, part, merging.forced)
            continue
        theta_0 = found.theta_0(part.name)
        require_in_range(theta_0, part.name)
        yield Place("unified", tasks), part.name, theta_0
        for task in tasks:
            if rank := group.ranks[task].get(part.name):
                factors = found.factors(task, part.name, rank)
                for end, factor in zip(FACTOR_ENDS, factors, strict=True):
                    stored = factor.to(theta_0.dtype)
                    require_in_range(stored, part.name)
                    stack = stored if part.name in group.stacked else stored[0]
                    yield Place("factors", (task,)), part.name + end, stack.contiguous()


def _parts(place: Place, block: BlockLayout, vector: Tensor, forced: torch.dtype | None) -> _Stored:
    for part in block.parts:
        dtype = forced or part.dtype(place.tasks)
        tensor = vector[part.slice].view(part.shape).to("cpu", dtype)
        require_in_range(tensor, part.name)
        yield place, part.name, tensor


def _require_reconstructible(
    group: StoredGroup, found: Masked, data: BlockData, forced: torch.dtype | None
) -> None:
    """Check that the weights that readers will make of a masked group are finite."""
    for index, part in enumerate(data.layout.parts):
        if not math.prod(part.shape):
            continue
        dtype = forced or part.dtype(group.tasks)
        base = data.part(data.base, index).abs().max()
        step = found.unified[part.slice].abs().max()
        most = float(base) + max(found.rescale.values()) * float(step)
        if most < _SAFE_RANGE * torch.finfo(dtype).max:
            continue
        for task in group.tasks:
            made = found.vector(data.base, task)[part.slice].to(dtype)
            require_in_range(made, part.name)


class Walk:
    """The models of a FlexMerge in memory, at one size after the other.

    Only what changes from size to size is merged; a merged tensor is one for its group.
    """

    def __init__(self, reader: BlockReader, merging: Merging):
        self._reader, self._merging = reader, merging
        blocks = reader.layout.blocks
        self._groups: list[list[StoredGroup]] = [[] for _ in blocks]
        self._tensors: list[dict[tuple[Place, str], Tensor]] = [{} for _ in blocks]
        self._rescale: list[dict[int, float]] = [{} for _ in blocks]
        layout = reader.layout
        given = {header.name: reader.tensor(layout.giver, header.name) for header in layout.given}
        self._private = [
            given | {header.name: reader.tensor(task, header.name) for header in headers}
            for task, headers in enumerate(layout.private)
        ]
        for task, tensors in zip(layout.tasks, self._private, strict=True):
            for name, tensor in tensors.items():
                finite(tensor, name, task)

    def go(self, plan: Plan) -> int:
        """Change to the groups of `plan`; return how many blocks had to be touched."""
        changed = 0
        for index, block in enumerate(self._reader.layout.blocks):
            # Without similarities, which do not change what is stored.
            wanted = [replace(group, similarity=None) for group in plan.groups[index]]
            before, held = self._groups[index], self._tensors[index]
            if set(wanted) == set(before):
                continue
            changed += 1
            new = [group for group in wanted if group not in before]
            for place, name, tensor in block_tensors(
                self._reader, block, new, self._merging, self._reader.tensor, self._rescale[index]
            ):
                held[place, name] = tensor.clone() if place.kind == "base" else tensor
            needed = {(place, name) for place, name, _ in stored(block.name, block.shapes, wanted)}
            self._tensors[index] = {key: held[key] for key in needed}
            self._groups[index] = wanted
        return changed

    def tensors(self, task: int) -> dict[str, Tensor]:
        """Return every tensor of one task at the present size, as a checkpoint of it holds them.

        On the CPU. Not to be written to: other tasks and later sizes have the same tensors.
        """
        made = dict(self._private[task])
        for index, block in enumerate(self._reader.layout.blocks):
            held = self._tensors[index]
            group = next(group for group in self._groups[index] if task in group.tasks)
            where = sources(block.name, block.shapes, group, task, self._rescale[index])
            for name, source in where:
                if isinstance(source, Place):
                    made[name] = held[source, name]
                else:
                    made[name] = source.reconstructed(name, lambda *key, held=held: held[key])
        return made
