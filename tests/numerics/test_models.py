"""mergekit's methods of the project; each test is a row of docs/numerics.md."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ext.errors import ConfigError, MergeError, MergeWarning, NonFiniteError
from tests.numerics.inputs import (
    NAME,
    drawn,
    filled,
    same_but_negative_zeros,
    spoilt,
    tuned,
    with_zeros,
)
from tests.numerics.merging import HOST, host, host_files

pytestmark = pytest.mark.filterwarnings(f"ignore::{MergeWarning.__module__}.MergeWarning")
each = pytest.mark.parametrize("name", HOST)


def merged(name, models, base=None, **more):
    return host(name, models, base, **more)[NAME]


@each
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(name, value):
    base, models = tuned()
    with pytest.raises(NonFiniteError, match="model1"):
        merged(name, [models[0], spoilt(models[1], value), models[2]], base)
    with pytest.raises(NonFiniteError, match="base"):
        merged(name, models, spoilt(base, value))


@each
def test_denormals(name):
    """What is so small counts as it does when everything is 2**120 times as large."""
    base, models = tuned(size=1e-40, base=0.0)
    large = [{NAME: model[NAME] * 2.0**120} for model in models]
    small, wanted = merged(name, models, base), merged(name, large, base) / 2.0**120
    assert small.any()
    # One unit is 1.4e-45.
    torch.testing.assert_close(small, wanted, rtol=0.01, atol=1e-43)


@each
def test_zeros(name):
    assert not merged(name, filled(0.0), filled(0.0)[0]).any()


@each
def test_models_equal_to_the_base(name):
    base, models = tuned()
    base = with_zeros(base)
    same = merged(name, [base] * 3, base)
    if name in ("nan", "nan_ties"):
        assert torch.equal(same.view(torch.int32), base[NAME].view(torch.int32))
    else:
        assert same_but_negative_zeros(same, base[NAME])
    some = merged(name, [base, *models[1:]], base)
    assert bool(torch.isfinite(some).all())
    assert not torch.equal(some, base[NAME])


@each
def test_duplicates(name):
    """The result moves along the task vector, whose spectrum spectral methods even out."""
    base, (model, *_) = tuned()
    change = merged(name, [model] * 3, base) - base[NAME]
    task_vector = model[NAME] - base[NAME]
    cosine = torch.cosine_similarity(change.reshape(-1), task_vector.reshape(-1), dim=0)
    spectral = dict.fromkeys(("tsv_m", "iso_c", "iso_cts"), 0.5)
    assert cosine > {"nan_ties": 0.85, "pcb": 0.85, **spectral}.get(name, 0.99)
    # The isotropic ones sum the task vectors.
    assert 0.5 < change.norm() / task_vector.norm() < (3.1 if name.startswith("iso") else 1.6)


@each
def test_results_beyond_float16(name):
    """Never infinity: an error, or a value that fits."""
    base, models = tuned(size=3.0, dtype=torch.float16)
    factor = {"nan": "scale", "nan_ties": "scale"}.get(name, "lambda")
    with pytest.raises(MergeError, match="not finite"):
        merged(name, models, base, **{factor: 1e6})


@each
def test_products_beyond_float16(name):
    """Weights of 65,504 times values do not overflow on the way: nothing is computed in halves."""
    models = filled(60_000.0, dtype=torch.float16)
    base = filled(59_000.0, dtype=torch.float16)[0]
    result = merged(name, models, base)
    assert bool(torch.isfinite(result).all())
    # The isotropic ones sum the task vectors.
    most = 62_100 if name.startswith("iso") else 61_500
    assert 59_000 <= float(result.min()) <= float(result.max()) <= most


@each
@pytest.mark.parametrize("exponent", [-100, 100])
def test_bfloat16_at_extreme_scales(name, exponent):
    """As at ordinary scales, times a power of two; PCB's competition depends on the scale."""
    base, models = tuned(dtype=torch.bfloat16)
    factor = 2.0**exponent
    wanted = merged(name, models, base) * factor
    far = [{NAME: model[NAME] * factor} for model in models]
    result = merged(name, far, {NAME: base[NAME] * factor})
    assert bool(torch.isfinite(result).all())
    torch.testing.assert_close(
        result, wanted, rtol=0.02, atol=(0.2 if name == "pcb" else 0.02) * factor
    )


@each
def test_differences_beyond_float32(name):
    with pytest.raises(MergeError, match="finite"):
        merged(name, filled(3e38), filled(-3e38)[0])


@each
@pytest.mark.parametrize("shape", [(1, 7), (7, 1)])
def test_thin_matrices(name, shape):
    """A row and the same numbers as a column give the same numbers."""
    base, models = tuned(shape)
    turned = [{NAME: model[NAME].T.contiguous()} for model in models]
    result = merged(name, models, base)
    assert result.shape == shape
    other = merged(name, turned, {NAME: base[NAME].T.contiguous()})
    torch.testing.assert_close(result.T, other, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_empty_tensors(name, shape):
    base, models = tuned(shape)
    assert merged(name, models, base).shape == shape


@each
def test_scalars(name):
    base, models = tuned(())
    result = merged(name, models, base)
    assert result.shape == ()
    assert bool(torch.isfinite(result))


@each
def test_integers_in_files(name, tmp_path):
    whole = {NAME: torch.arange(4), "c": torch.tensor([1 + 2j])}
    for tensor, found in host_files(tmp_path / "same", name, [whole] * 3, whole).items():
        assert torch.equal(found, whole[tensor])
    other = {**whole, NAME: torch.arange(1, 5)}
    with pytest.raises(ConfigError, match=f"{NAME}: found whole numbers that differ"):
        host_files(tmp_path / NAME, name, [whole, other, whole], whole)
    other = {**whole, "c": torch.tensor([1 + 3j])}
    with pytest.raises(MergeError, match="'c' differs between inputs"):
        host_files(tmp_path / "c", name, [whole, other, whole], whole)
    bad = {**whole, "c": torch.tensor([complex(math.nan, 0)])}
    with pytest.raises(MergeError, match="'c' differs between inputs"):
        host_files(tmp_path / "nan", name, [bad] * 3, bad)


@each
def test_large_tables_are_compared_while_merging(name, tmp_path):
    """Before the merge they are not read."""
    table = {NAME: torch.zeros((1 << 17) + 1, dtype=torch.int64)}
    with pytest.raises(MergeError, match=f"'{NAME}' differs between inputs"):
        host_files(tmp_path / "large", name, [table, {NAME: table[NAME] + 1}, table], table)


@each
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counters_of_training(name, dtype, tmp_path):
    """Every fine-tune of a model with batch norms has its own, and no output depends on them."""
    counter = "bn.num_batches_tracked"
    states = [
        {NAME: drawn(4, 5, seed=i), counter: torch.tensor(7 * i, dtype=dtype)} for i in range(4)
    ]
    merged = host_files(tmp_path / "files", name, states[1:], states[0])
    assert torch.equal(merged[counter], states[0][counter])
    if name in ("nan", "lore"):
        for order in ([1, 2, 3], [3, 1, 2], [2, 3, 1]):
            models = [states[i] for i in order]
            merged = host_files(tmp_path / f"first{order[0]}", name, models, None)
            assert torch.equal(merged[counter], states[order[0]][counter])


@pytest.mark.parametrize("name", ["nan", "lore"])
def test_without_a_base(name):
    """Zeros stay zeros, and means of large numbers do not overflow."""
    assert not merged(name, filled(0.0)).any()
    torch.testing.assert_close(merged(name, filled(3e38)), filled(3e38)[0][NAME])
    far = [{NAME: drawn(6, 5, seed=i, size=1e30).to(torch.bfloat16)} for i in range(3)]
    assert bool(torch.isfinite(merged(name, far)).all())
