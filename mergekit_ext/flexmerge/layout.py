"""What the models of a FlexMerge have in common, from names, shapes and dtypes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch

from mergekit_ext.io.headers import TensorHeader

# Dtypes that arithmetic on task vectors makes sense for, by their names in the format.
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Part:
    """One tensor of a block: where it lies in the concatenated block vector.

    Attributes:
        dtypes: the dtype that each task's model stores it in.
        base_dtype: the dtype that the base stores it in.
        matrices: how a tensor of more than two axes is seen as matrices: ``stacked``,
            ``flattened`` or ``matrix`` (`kernels.lore`).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    dtypes: tuple[torch.dtype, ...]
    base_dtype: torch.dtype
    matrices: str = "matrix"

    @property
    def slice(self) -> slice:
        """Its place in the block vector."""
        return slice(self.start, self.start + math.prod(self.shape))

    def dtype(self, tasks: Sequence[int]) -> torch.dtype:
        """Return the dtype that holds the values of all `tasks`."""
        return reduce(torch.promote_types, (self.dtypes[task] for task in tasks))


@dataclass(frozen=True)
class BlockLayout:
    """Tensors that are merged as one vector."""

    name: str
    kind: str
    depth: int | None
    parts: tuple[Part, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of its tensors by name, in order."""
        return {part.name: part.shape for part in self.parts}

    @property
    def size(self) -> int:
        """Elements of the block vector."""
        return self.parts[-1].slice.stop

    def bytes(self, tasks: Sequence[int], forced: torch.dtype | None = None) -> int:
        """Return the bytes of one dense copy that `tasks` share."""
        return sum(
            math.prod(part.shape) * (forced or part.dtype(tasks)).itemsize for part in self.parts
        )

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's copy."""
        return sum(math.prod(part.shape) * part.base_dtype.itemsize for part in self.parts)

    def dtype(self, tasks: Sequence[int]) -> torch.dtype:
        """Return the dtype that holds every tensor of all `tasks`."""
        return reduce(torch.promote_types, (part.dtype(tasks) for part in self.parts))


@dataclass(frozen=True)
class Layout:
    """Blocks in network order, and what each task keeps for itself."""

    tasks: tuple[str, ...]
    blocks: tuple[BlockLayout, ...]
    private: tuple[tuple[TensorHeader, ...], ...]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that task vectors are formed in, the same in every block."""
        parts = [part for block in self.blocks for part in block.parts]
        stored = {dtype for part in parts for dtype in (part.base_dtype, *part.dtypes)}
        return torch.float64 if torch.float64 in stored else torch.float32

    @cached_property
    def private_bytes(self) -> int:
        """Bytes of all private tensors."""
        return sum(header.nbytes for headers in self.private for header in headers)


@dataclass(frozen=True)
class Naming:
    """How names become blocks.

    Attributes:
        blocks: from names to blocks in network order, each with its tensors in order.
        kind: the kind of block that a name belongs to.
        depth: the layer that a name belongs to, if any.
        private: whether a name belongs to one task whatever its shape (a classification head).
        matrices: from a name and a number of axes to `Part.matrices`.
        ties: of names, those that are one tensor in the model.
    """

    blocks: Callable[[Sequence[str]], Mapping[str, Sequence[str]]]
    kind: Callable[[str], str]
    depth: Callable[[str], int | None]
    private: Callable[[str], bool]
    matrices: Callable[[str, int], str]
    ties: Callable[[Collection[str]], Sequence[Collection[str]]] = lambda names: ()


def complete_ties(
    owners: Sequence[Mapping[str, TensorHeader]], naming: Naming
) -> list[Mapping[str, TensorHeader]]:
    """Let base and models (in this order) have their tied tensors under the same names.

    Some files hold a tied tensor under one of its names, others under several. A copy that only
    some have would be private to them, and differ from what is merged under the first name:
    loaders no longer tie what differs.
    """
    completed = [dict(owner) for owner in owners]
    written = {name for model in owners[1:] for name in model}
    for tied in naming.ties(written):
        names = sorted(tied)
        added = []
        for owner in owners:
            found = [owner[name] for name in names if name in owner]
            added.append({name: owner.get(name, found[0]) for name in names} if found else {})
        if all(_shareable(added, name) for name in names):
            for owner, headers in zip(completed, added, strict=True):
                owner.update(headers)
    return list(completed)


def make_layout(
    tasks: Sequence[str],
    base: Mapping[str, TensorHeader],
    models: Sequence[Mapping[str, TensorHeader]],
    naming: Naming,
) -> Layout:
    """Sort the stored tensors of m models into blocks and private ones, after `complete_ties`.

    A tensor is merged if the base and every model have it in one shape and a floating dtype, and
    it is not a task's head. Everything else is private to each task that has it.
    """
    merged = [
        name for name in models[0] if not naming.private(name) and _shareable([base, *models], name)
    ]
    blocks = tuple(
        _block(block, names, [base, *models], naming)
        for block, names in naming.blocks(merged).items()
    )
    kept = set(merged)
    private = tuple(
        tuple(header for name, header in model.items() if name not in kept) for model in models
    )
    return Layout(tuple(tasks), blocks, private)


def _shareable(owners: Sequence[Mapping[str, TensorHeader]], name: str) -> bool:
    headers = [owner.get(name) for owner in owners]
    first = headers[0]
    return first is not None and all(
        header is not None and header.shape == first.shape and header.dtype in FLOATING
        for header in headers
    )


def _block(
    block: str, names: Sequence[str], owners: Sequence[Mapping[str, TensorHeader]], naming: Naming
) -> BlockLayout:
    parts, start = [], 0
    for name in names:
        shape = owners[0][name].shape
        base, *models = (FLOATING[owner[name].dtype] for owner in owners)
        matrices = naming.matrices(name, len(shape))
        parts.append(Part(name, shape, start, tuple(models), base, matrices))
        start += math.prod(shape)
    return BlockLayout(block, naming.kind(names[0]), naming.depth(names[0]), tuple(parts))


@dataclass(frozen=True)
class Renaming:
    """How the base's names become those of the models: a prefix is added, or taken away.

    ``ViTModel`` stores ``encoder.layer.0...`` where ``ViTForImageClassification`` has
    ``vit.encoder.layer.0...``; transformers itself loads either into either.
    """

    prefix: str
    adds: bool

    def apply(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.adds else name.removeprefix(f"{self.prefix}.")

    def __str__(self) -> str:
        if self.adds:
            return f"the base is a bare model: its tensors are read as `{self.prefix}.<name>`"
        return f"the models are bare: the base's tensors are read without `{self.prefix}.`"


def find_renaming(base: Collection[str], models: Sequence[Collection[str]]) -> Renaming | None:
    """Return the one prefix with which most of the names agree that do not agree as they are.

    With the prefix, more than half of the base's names (of the models' common names, where it is
    taken away) are names of all models, and more than without it. None if there is no such
    prefix, or more than one.
    """
    known = set(base)
    shared = reduce(set.intersection, map(set, models)) if models else set()
    alike = len(known & shared)
    added = Counter(prefix for name in shared for prefix, rest in _splits(name) if rest in known)
    taken = Counter(prefix for name in known for prefix, rest in _splits(name) if rest in shared)
    found = [Renaming(p, True) for p, n in added.items() if n > max(alike, len(known) / 2)]
    found += [Renaming(p, False) for p, n in taken.items() if n > max(alike, len(shared) / 2)]
    return found[0] if len(found) == 1 else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end]), ".".join(parts[end:])
