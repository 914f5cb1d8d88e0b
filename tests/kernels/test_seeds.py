from __future__ import annotations

import pytest
import torch

from mergekit_ext.kernels.seeds import drop_and_rescale


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def delta(count=200_000, dtype=torch.float32):
    return torch.randn(count, generator=seeded(9)).to(dtype)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_kept_entries_are_rescaled_and_the_others_zero(density, device):
    x = delta().to(device)
    found = drop_and_rescale(x, density, seeded())
    kept = found != 0
    torch.testing.assert_close(found[kept], x[kept] / density, rtol=1e-6, atol=0)
    # five standard deviations of the binomial
    spread = 5 * (density * (1 - density) / x.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - density) < spread


def test_the_expectation_is_the_task_vector():
    x = torch.tensor([1.0, -2.0, 0.0])
    mean = drop_and_rescale(x.expand(100_000, 3), 0.3, seeded()).mean(0)
    torch.testing.assert_close(mean, x, rtol=0, atol=0.05)


def test_a_seed_decides(device):
    x = delta(1000).to(device)
    first, again = (drop_and_rescale(x, 0.5, seeded(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, drop_and_rescale(x, 0.5, seeded(4)))
    assert torch.equal(first.cpu(), drop_and_rescale(x.cpu(), 0.5, seeded(3)))


def test_full_density_is_the_task_vector_and_draws_nothing():
    x, generator = delta(10), seeded()
    before = generator.get_state()
    found = drop_and_rescale(x, 1.0, generator)
    assert torch.equal(found, x) and found.data_ptr() != x.data_ptr()
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes_and_the_input_stays(dtype, out):
    x = delta(100, dtype).reshape(4, 25)
    before = x.clone()
    found = drop_and_rescale(x, 0.5, seeded())
    assert found.dtype == out and found.shape == x.shape
    assert torch.equal(x, before)


def test_nan_is_not_dropped_silently():
    assert drop_and_rescale(torch.full((100,), torch.nan), 0.1, seeded()).isnan().all()
