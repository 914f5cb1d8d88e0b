"""Private tensors are copied as they are; NaN and infinity in them are not copied silently."""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.errors import NonFiniteError
from mergekit_ext.flexmerge.merging import Merging, Walk
from mergekit_ext.flexmerge.reader import open_checkpoint
from tests.flexmerge.inputs import family, reader
from tests.flexmerge.test_writer import algorithm_for, write

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
# Of the rest those with a NaN; some have no infinity.
NAN_ONLY = [
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.float8_e5m2fnuz,
    torch.float8_e4m3fnuz,
]


def with_heads(value: float, dtype: torch.dtype):
    base, models = family(2)
    for size, model in enumerate(models, 2):
        model["head.weight"] = torch.ones(size, 3).to(dtype)
        model["head.steps"] = torch.tensor([1 << 60])
    models[1]["head.weight"] = torch.tensor([[1.0, value, value]], dtype=torch.float64).to(dtype)
    return base, models


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value, dtype, tmp_path):
    base, models = with_heads(value, dtype)
    with pytest.raises(NonFiniteError) as caught:
        write(tmp_path / "out", base, models, 1)
    found = caught.value
    assert (found.tensor, found.model, found.count, found.size) == ("head.weight", "task1", 2, 3)
    with pytest.raises(NonFiniteError, match=r"head\.weight of model task1"):
        Walk(reader(base, models), Merging(algorithm_for("average", 2)))


@pytest.mark.parametrize("dtype", NAN_ONLY)
def test_nan_of_other_dtypes_is_named(dtype, tmp_path):
    base, models = with_heads(float("nan"), dtype)
    with pytest.raises(NonFiniteError, match=r"head\.weight of model task1: found 2 non-finite"):
        write(tmp_path / "nan", base, models, 1)
    base, models = with_heads(1.0, dtype)
    if dtype.is_complex:
        models[1]["head.weight"] += 2j
    write(tmp_path / "one", base, models, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_are_finite(dtype, tmp_path):
    base, models = with_heads(torch.finfo(dtype).max, dtype)
    write(tmp_path / "out", base, models, 1)
    Walk(reader(base, models), Merging(algorithm_for("average", 2)))


def test_bytes_stay_as_they_are(tmp_path):
    base, models = with_heads(-0.0, torch.bfloat16)
    write(tmp_path / "out", base, models, 1)
    checkpoint = open_checkpoint(tmp_path / "out")
    for task, model in zip(checkpoint.tasks, models, strict=True):
        for name in ("head.weight", "head.steps"):
            stored = checkpoint.tensors(task)[name].view(torch.uint8)
            assert torch.equal(stored, model[name].view(torch.uint8))
