"""Base and residuals of all tasks, computed once for each block and kept in files.

Only triplets that can be kept are computed. The files serve until ranks are known.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ext.flexmerge.analysis import out_of_range, require_finite_block
from mergekit_ext.flexmerge.layout import BlockLayout
from mergekit_ext.flexmerge.residual import Limit, ResidualStorage, Spectrum
from mergekit_ext.flexmerge.source import BlockReader
from mergekit_ext.io.journal import Finished
from mergekit_ext.kernels.numerics import all_finite
from mergekit_ext.kernels.ranks import deepened
from mergekit_ext.kernels.truncated import factors
from mergekit_ext.parallel import current

# Ranks are computed this far beyond the mean one that the budget allows.
_FIRST_DEPTH, _LEAST_DEPTH = 1.25, 8
_READ = 1 << 24


class Decomposition:
    """theta_0 and factors of all tasks in files, one for each block, in `folder`."""

    def __init__(
        self,
        reader: BlockReader,
        storage: ResidualStorage,
        folder: Path,
        progress: Callable[[str], None] = lambda name: None,
        measuring: Callable[[], AbstractContextManager[None]] = nullcontext,
        finished: Finished | None = None,
    ):
        self._reader, self.storage, self._folder = reader, storage, folder
        self._progress, self._measuring = progress, measuring
        self._finished = finished or Finished()
        self._limit, self._spectra = Limit(0.0), list[Spectrum]()

    def spectra(self, limit: Limit) -> Sequence[Spectrum]:
        """Return leading singular values, at least as many as can be kept within a limit.

        Those of an earlier call serve for smaller budgets. The processes of a merge share out the
        blocks, and all call this.
        """
        if not self._spectra or limit != Limit(min(limit.budget, self._limit.budget)):
            with self._measuring():
                self._limit, self._spectra = limit, self._deep_enough(limit)
        return self._spectra

    def _deep_enough(self, limit: Limit) -> list[Spectrum]:
        storage, processes = self.storage, current()
        processes.from_main(lambda: self._folder.mkdir(parents=True, exist_ok=True))
        tasks, matrices = range(storage.tasks), storage.matrices
        blocks = storage.layout.blocks
        owners = processes.share([block.bytes(tasks) for block in blocks])
        found: dict[str, Spectrum] = {}

        def decompose(wanted: Sequence[int], depths: Sequence[int]) -> None:
            own: dict[str, Spectrum] = {}
            for index in sorted({matrices[k][0] for k in wanted}) if found else range(len(blocks)):
                if owners[index] == processes.rank:
                    deep = {p.name: depths[k] for k, (b, p) in enumerate(matrices) if b == index}
                    own |= self._decomposed(index, deep)
                    self._progress(blocks[index].name)
            for part_of in processes.gather(own):
                found.update(part_of)

        def chosen() -> Sequence[int]:
            ranks = storage.ranks([found[part.name] for _, part in matrices], limit)
            return [max(ranks[k : k + len(tasks)]) for k in range(0, len(ranks), len(tasks))]

        most = [storage.algorithm.largest_rank(part) for _, part in matrices]
        limited = [min(top, limit.rank or top) for top in most]
        deepened(limited, self._first_depth(limit), decompose, chosen)
        return [found[part.name] for _, part in matrices]

    def _first_depth(self, limit: Limit) -> int:
        """Return how many triplets of each residual are computed at first."""
        storage = self.storage
        step: int = storage.algorithm.parameters.shared["rank_multiple"]
        if limit.rank is not None:
            return limit.rank
        mean = 0
        if limit.budget < math.inf:
            each = storage.tasks * sum(storage.cost(part) for _, part in storage.matrices)
            mean = int(limit.budget // max(each, 1))
        return -(-max(int(_FIRST_DEPTH * mean), _LEAST_DEPTH) // step) * step

    def theta_0(self, block: str, name: str) -> Tensor:
        """Return a tensor of theta_0."""
        return self._get(block, f"theta_0/{name}")

    def factors(self, block: str, task: int, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """Return B, (n, rows, rank), and A, (n, rank, columns), of a residual ``B A``.

        In the dtype of the arithmetic; sigma is shared out evenly.
        """
        b, a = (self._get(block, f"{kind}/{task}/{name}") for kind in ("b", "a"))
        return b[..., :rank], a[..., :rank, :]

    def _get(self, block: str, key: str) -> Tensor:
        with safe_open(self._path(block), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _path(self, block: str) -> Path:
        names = [layout.name for layout in self.storage.layout.blocks]
        return self._folder / f"{names.index(block)}.safetensors"

    def _decomposed(self, index: int, depths: Mapping[str, int]) -> dict[str, Spectrum]:
        """Decompose one block, if no earlier run has, and return its spectra."""
        block = self.storage.layout.blocks[index]
        path, key = self._path(block.name), json.dumps([block.name, depths])
        crc = self._finished.found("residuals", key)
        if crc is None or not path.is_file() or _crc(path) != crc:
            save_file(self._made(block, depths), path)
            self._finished.add("residuals", key, _crc(path))
        return self.measured(block.name)

    def measured(self, block: str) -> dict[str, Spectrum]:
        """Return what is measured of each tensor of a block; no squares if it has no factors."""
        with safe_open(self._path(block), framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys() if key[0] in "sw"}  # noqa: SIM118
        names = [key.partition("/")[2] for key in found if key.startswith("whole/")]
        none = torch.zeros(self.storage.tasks, 0)
        return {n: Spectrum(found.get(f"squares/{n}", none), found[f"whole/{n}"]) for n in names}

    def _made(self, block: BlockLayout, depths: Mapping[str, int]) -> dict[str, Tensor]:
        data, forced, wide = (
            self._reader.read(block),
            self.storage.forced,
            self._reader.layout.dtype,
        )
        require_finite_block(data, self._reader.layout)
        tasks = list(data.models)
        merged = self.storage.algorithm.merge(data, tasks, forced or block.dtype(tasks))
        made: dict[str, Tensor] = {}
        for index, part in enumerate(block.parts):
            theta_0 = data.part(merged, index).to(forced or part.dtype(tasks))
            made[f"theta_0/{part.name}"] = theta_0.cpu()
            squares, whole = [], []
            for task in tasks:
                model = data.part(data.models[task], index).to(wide)
                residual = (model - theta_0).view(part.matrix_shape)
                if not all_finite(residual):
                    raise out_of_range(block.name)
                if part.name not in depths:
                    whole.append(float(residual.square().sum(dtype=torch.float64)))
                    continue
                b, a, own, norm = factors(residual, depths[part.name])
                made[f"b/{task}/{part.name}"] = b.to(wide).cpu().contiguous()
                made[f"a/{task}/{part.name}"] = a.to(wide).cpu().contiguous()
                squares.append(own)
                whole.append(norm)
            if squares:
                made[f"squares/{part.name}"] = torch.stack(squares)
            made[f"whole/{part.name}"] = torch.tensor(whole, dtype=torch.float64)
        return made


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_READ):
            value = zlib.crc32(piece, value)
    return value
