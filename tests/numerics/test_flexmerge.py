"""FlexMerge's algorithms, all models in one group; each test is a row of docs/numerics.md."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ext.errors import MergekitExtError, NonFiniteError
from tests.numerics.inputs import (
    NAME,
    filled,
    same_but_negative_zeros,
    spoilt,
    tuned,
    with_zeros,
)
from tests.numerics.merging import FLEXMERGE, flexmerge

each = pytest.mark.parametrize("name", FLEXMERGE)


def merged(folder, name, models, base, **more):
    """The tensor of each task."""
    return [state[NAME] for state in flexmerge(folder, name, models, base, **more)]


def all_finite(tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@each
def test_nan_and_infinity(name, tmp_path):
    base, models = tuned()
    for place, value in enumerate((math.nan, math.inf)):
        with pytest.raises(NonFiniteError, match="w of model"):
            bad = [models[0], spoilt(models[1], value), models[2]]
            merged(tmp_path / f"model{place}", name, bad, base)
    with pytest.raises(NonFiniteError, match="base"):
        merged(tmp_path / "base", name, models, spoilt(base, math.nan))


@each
def test_denormals(name, tmp_path):
    base, models = tuned(size=1e-40, base=0.0)
    for tensor in merged(tmp_path, name, models, base):
        assert 1e-41 < float(tensor.abs().max()) < 1e-39


@each
def test_zeros(name, tmp_path):
    found = merged(tmp_path, name, filled(0.0), filled(0.0)[0])
    assert not any(bool(tensor.any()) for tensor in found)


@each
def test_models_equal_to_the_base(name, tmp_path):
    base, models = tuned()
    base = with_zeros(base)
    for tensor in merged(tmp_path / "all", name, [base] * 3, base):
        assert same_but_negative_zeros(tensor, base[NAME])
    assert all_finite(merged(tmp_path / "one", name, [base, *models[1:]], base))


@each
def test_duplicates(name, tmp_path):
    base, (model, *_) = tuned()
    task_vector = (model[NAME] - base[NAME]).reshape(-1)
    for tensor in merged(tmp_path, name, [model] * 3, base, **_whole(name)):
        change = (tensor - base[NAME]).reshape(-1)
        # TSV-M makes equal directions count once, isotropic merging all of them alike.
        least = 0.5 if name in ("tsv_m", "iso_c", "iso_cts") else 0.99
        assert torch.cosine_similarity(change, task_vector, dim=0) > least


@each
def test_results_beyond_float16(name, tmp_path):
    """Never infinity: an error, or a value that fits."""
    base, models = tuned(size=3.0, dtype=torch.float16)
    try:
        found = merged(tmp_path, name, models, base, weight=1e5)
    except MergekitExtError as error:
        assert "finite" in str(error) or "weight" in str(error)
    else:
        assert all_finite(found)


@each
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_bfloat16_at_extreme_scales(name, size, tmp_path):
    base, models = tuned(size=size, base=size, dtype=torch.bfloat16)
    for tensor in merged(tmp_path, name, models, base):
        assert 0.1 < float(tensor.abs().max()) / size < 20


@each
def test_differences_beyond_float32(name, tmp_path):
    with pytest.raises(MergekitExtError, match="finite"):
        merged(tmp_path, name, filled(3e38), filled(-3e38)[0])


@each
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), ()])
def test_thin_matrices_and_scalars(name, shape, tmp_path):
    base, models = tuned(shape)
    found = merged(tmp_path, name, models, base)
    assert {tuple(tensor.shape) for tensor in found} == {shape}
    assert all_finite(found)


@each
def test_tensors_that_are_not_merged(name, tmp_path):
    """They are in the output as they are; alone they are nothing that can be merged."""
    base, models = tuned()
    more = {
        "none": torch.zeros(0, 4),
        "places": torch.arange(4),
        "complex": torch.tensor([1 + 2j]),
        "scales": torch.ones(4).to(torch.float8_e8m0fnu),
    }
    whole = [{**model, **more} for model in models]
    for state in flexmerge(tmp_path / "some", name, whole, {**base, **more}):
        for key, tensor in more.items():
            assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor)
    for key in ("complex", "scales"):
        bad = {key: torch.full(more[key].shape, math.nan).to(more[key].dtype)}
        with pytest.raises(NonFiniteError, match=f"{key} of model"):
            flexmerge(tmp_path / key, name, [{**model, **bad} for model in whole], base)
    with pytest.raises(MergekitExtError, match="no tensor"):
        flexmerge(tmp_path / "alone", name, [more] * 3, more)


def _whole(name):
    """Nothing trimmed."""
    return {"density": 1.0} if name in ("ties", "pcb", "consensus") else {}
