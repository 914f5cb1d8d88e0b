"""Base and residuals of all tasks, computed once for each tensor and kept in files.

Only triplets that can be kept are computed. The files serve until ranks are known.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext import parallel
from mergekit_ext.flexmerge.analysis import out_of_range, require_finite_block
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.residual import Limit, ResidualStorage, Spectrum
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.numerics import all_finite
from mergekit_ext.kernels.ranks import deepened, mean_rank
from mergekit_ext.kernels.threads import in_threads
from mergekit_ext.kernels.truncated import factors

# Numbers of a matrix up to which one thread decomposes it, beside those of other tasks.
SMALL = 1 << 22


class Decomposition:
    """theta_0 and factors of all tasks in files, one for each tensor, in `folder`."""

    def __init__(
        self,
        reader: BlockReader,
        storage: ResidualStorage,
        folder: Path,
        progress: Callable[[str], None] = lambda name: None,
        measuring: Callable[[], AbstractContextManager[Any]] = nullcontext,
        finished: Finished | None = None,
    ):
        self._reader, self.storage, self._folder = reader, storage, folder
        self._progress, self._measuring = progress, measuring
        self._finished = finished or Finished()
        self._limit = Limit(0.0)
        parts = [part.name for block in storage.layout.blocks for part in block.parts]
        self._numbers = {name: number for number, name in enumerate(parts)}
        self._depths: dict[str, int] = {}
        self.measured: dict[str, Spectrum] = {}  # of all tensors; no squares without factors

    def spectra(self, limit: Limit) -> Sequence[Spectrum]:
        """Return leading singular values, at least as many as can be kept within a limit.

        Those of an earlier call serve for smaller budgets. The processes of a merge share out the
        blocks, and all call this.
        """
        storage, parts = self.storage, [part for _, part in self.storage.matrices]
        tasks, shared = storage.tasks, storage.algorithm.parameters.shared

        def decompose(wanted: Sequence[int], depths: Sequence[int]) -> None:
            self._decompose({parts[k].name: depths[k] for k in wanted})

        def chosen(like: Sequence[int]) -> Sequence[int]:
            ranks = storage.ranks([self.measured[parts[k].name] for k in like], limit)
            return [max(ranks[k : k + tasks]) for k in range(0, len(ranks), tasks)]

        if not self.measured or limit != Limit(min(limit.budget, self._limit.budget)):
            parallel.current().from_main(lambda: self._folder.mkdir(parents=True, exist_ok=True))
            most = [storage.algorithm.largest_rank(part) for part in parts]
            each = mean_rank(limit.budget, [tasks * storage.cost(part) for part in parts])
            first, names = limit.rank or each, [part.name for part in parts]
            with self._measuring():
                most = [min(top, limit.rank or top) for top in most]
                deepened(most, first, names, decompose, chosen, shared["rank_multiple"])
            self._limit = limit
        return [self.measured[part.name] for part in parts]

    def _decompose(self, depths: Mapping[str, int]) -> None:
        """Decompose some tensors, and write what has no residual of their blocks, and of others."""
        processes, blocks = parallel.current(), self.storage.layout.blocks
        own: dict[str, Spectrum] = {}
        low = {part.name for _, part in self.storage.matrices}
        owners = processes.share([block.bytes(range(self.storage.tasks)) for block in blocks])
        for block, owner in zip(blocks, owners, strict=True):
            names = {part.name for part in block.parts}
            if names & low and names.isdisjoint(depths):
                continue
            wanted = {name: depths.get(name, 0) for name in names & {*depths} | names - low}
            deeper = {n: depth for n, depth in wanted.items() if depth > self._depths.get(n, -1)}
            if deeper and owner == processes.rank:
                own |= self._spectra_of(block, deeper)
                if names.isdisjoint(self._depths):
                    self._progress(block.name)
            self._depths |= deeper
        self.measured |= processes.gather_items(own)

    def theta_0(self, name: str) -> Tensor:
        """Return a tensor of theta_0."""
        return self._get(name, "theta_0")[0]

    def factors(self, task: int, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """Return B, (n, rows, rank), and A, (n, rank, columns), of a residual ``B A``.

        In the dtype of the arithmetic; sigma is shared out evenly.
        """
        b, a = self._get(name, f"b/{task}", f"a/{task}")
        return b[..., :rank], a[..., :rank, :]

    def _get(self, name: str, *keys: str) -> list[Tensor]:
        with safe_open(self._path(name, self._depths[name]), framework="pt") as file:
            return [file.get_tensor(key) for key in keys]

    def _path(self, name: str, depth: int) -> Path:
        return self._folder / f"{self._numbers[name]}-{depth}.safetensors"

    def _spectra_of(self, block: BlockLayout, depths: Mapping[str, int]) -> dict[str, Spectrum]:
        """Decompose tensors of one block, if no earlier run has, and return their spectra."""

        def is_done(name: str) -> bool:
            path = self._path(name, depths[name])
            crc = self._finished.found("residuals", path.name)
            return crc is not None and path.is_file() and _crc(path) == crc

        found = dict[str, Spectrum]()
        missing = {name: depth for name, depth in depths.items() if not is_done(name)}
        for name, tensors in self._made(block, missing) if missing else ():
            path = self._path(name, depths[name])
            save_file(tensors, path)
            self._finished.add("residuals", path.name, _crc(path))
        for name, depth in depths.items():
            with safe_open(self._path(name, depth), framework="pt") as file:
                found[name] = Spectrum(file.get_tensor("squares"), file.get_tensor("whole"))
        return found

    def _made(
        self, block: BlockLayout, depths: Mapping[str, int]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        data, storage, wide = self._reader.read(block), self.storage, self._reader.layout.dtype
        require_finite_block(data, self._reader.layout)
        tasks, forced = list(data.models), storage.forced
        merged = storage.algorithm.merge(data, tasks, forced or block.dtype(tasks))

        def of_task(task: int) -> tuple[dict[str, Tensor], Tensor, float]:
            model = data.part(data.models[task], index).to(wide)
            residual = (model - theta_0).view(part.matrix_shape)
            if not all_finite(residual):
                raise out_of_range(block.name)
            if not depths[part.name]:
                return {}, torch.zeros(0), float(residual.square().sum(dtype=torch.float64))
            b, a, own, norm = factors(residual, depths[part.name])
            pair = {f"b/{task}": b, f"a/{task}": a}
            return {key: each.to(wide).cpu().contiguous() for key, each in pair.items()}, own, norm

        for index, part in enumerate(block.parts):
            if part.name not in depths:
                continue
            theta_0 = data.part(merged, index).to(forced or part.dtype(tasks))
            small = math.prod(part.shape) <= SMALL
            each = in_threads(of_task, tasks, theta_0.device) if small else map(of_task, tasks)
            pairs, squares, whole = zip(*each, strict=True)
            made = {key: tensor for pair in pairs for key, tensor in pair.items()}
            made |= {"theta_0": theta_0.cpu(), "squares": torch.stack(squares)}
            yield part.name, {**made, "whole": torch.tensor(whole, dtype=torch.float64)}


def _crc(path: Path) -> int:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return zlib.crc32(content)
