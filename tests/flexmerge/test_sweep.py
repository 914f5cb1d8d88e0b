"""Every merged vector of every size, in one pass."""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.algorithms import ALGORITHMS, linear
from mergekit_ext.flexmerge.algorithms.base import Parameters
from mergekit_ext.flexmerge.analysis import analyse
from mergekit_ext.flexmerge.sweep import sweep
from mergekit_ext.kernels.grouping import dendrogram
from tests.flexmerge.inputs import SHAPES, reader

PARAMETERS = {
    "average": {},
    "task_arithmetic": {"lambda": 1.5},
    "tsv_m": {"lambda": 1.0},
}


def states(dtype, count=4):
    generator = torch.Generator().manual_seed(3)

    def draw():
        return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}

    base = draw()
    return base, [{n: t + 0.1 * draw()[n] for n, t in base.items()} for _ in range(count)]


def vectors_of(pieces):
    """The pieces put together: (block, merge, vector) in the order of the merges."""
    made = {}
    for piece in pieces:
        for merge, row in zip(piece.merges, piece.vectors, strict=True):
            vector = made.setdefault(
                (piece.block.name, merge), row.new_full((piece.block.size,), torch.nan)
            )
            assert vector[piece.part].isnan().all()
            vector[piece.part] = row
    return [(block, merge, vector) for (block, merge), vector in made.items()]


@pytest.mark.parametrize("piece", [1 << 24, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
def test_all_merges_of_all_blocks(name, dtype, piece, monkeypatch):
    monkeypatch.setattr(linear, "_PIECE", piece)
    base, models = states(dtype)
    weights = [{"weight": w} for w in (1.0, 0.5, 2.0, 1.0)]
    algorithm = ALGORITHMS[name](Parameters(PARAMETERS[name], weights))
    inputs = reader(base, models)
    found = vectors_of(sweep(inputs, algorithm))
    analysis = analyse(inputs)
    wanted = [
        (block, merge)
        for block in inputs.layout.blocks
        for merge in dendrogram(analysis.cosines(block.name))
    ]
    assert [(b, m) for b, m, _ in found] == [(b.name, m) for b, m in wanted]
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for (block, merge), (_, _, vector) in zip(wanted, found, strict=True):
        expected = algorithm.merge(inputs.read(block), merge.union, dtype)
        assert vector.dtype == dtype
        torch.testing.assert_close(vector, expected, rtol=tolerance, atol=tolerance)


def test_not_a_number_stops_it():
    base, models = states(torch.float32)
    models[2]["mlp.up"][0, 0] = torch.nan
    algorithm = ALGORITHMS["average"](Parameters({}, [{"weight": 1.0}] * 4))
    with pytest.raises(NonFiniteError, match=r"mlp\.up"):
        list(sweep(reader(base, models), algorithm))
