from __future__ import annotations

import pytest
import torch

from mergekit_ext.errors import NonFiniteError
from peft_merge.adapter import Update
from peft_merge.coefficients import change_norms, coefficients, update_norm
from tests.peft_merge.loras import adapter, update
from tests.reference.adapters import nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("shape", [(1, 24, 18), (3, 5, 4), (1, 1, 1)])
def test_norms(dtype, size, shape):
    one = update(1, 3, shape, scale=-0.7, dtype=dtype, size=size)
    assert update_norm(one) == pytest.approx(float(one.dense().norm()), rel=1e-12)


def test_the_bias_counts():
    one = update(1, 3, bias=True)
    wanted = torch.cat([one.dense().flatten(), one.scale * one.bias.double()]).norm()
    assert update_norm(one) == pytest.approx(float(wanted), rel=1e-12)
    alone = Update(one.a, torch.zeros_like(one.b), 0.5, one.bias)
    assert update_norm(alone) == pytest.approx(0.5 * float(one.bias.double().norm()), rel=1e-12)


def test_products_that_cancel():
    a, b = update(1, 1).a.double(), update(1, 1).b.double()
    # B A = b (a - (1 - 1e-9) a): nine digits cancel
    twice = Update(torch.cat([a, (1e-9 - 1) * a], 1), torch.cat([b, b], 2), 1.0)
    assert update_norm(twice) == pytest.approx(float(twice.dense().norm()), rel=1e-6)


def test_norms_of_adapters():
    one = adapter("one", {"x": update(1, 3), "y": update(2, 2)})
    two = adapter("two", {"z": update(3, 3), "x": update(4, 1, dtype=torch.bfloat16)})
    norms = {module: change_norms([one, two], module, space="delta") for module in "xyz"}
    assert norms["y"][1] == 0.0 and norms["z"][0] == 0.0
    changes = [one.load("x").dense(), two.load("x").dense()]
    assert coefficients(norms)["x"] == pytest.approx(nan(changes), rel=1e-12)


def test_coefficients_by_module_and_by_adapter():
    norms = {"x": [3.0, 1.0, 0.0], "y": [4.0, 0.0, 0.0]}
    assert coefficients(norms) == {
        "x": pytest.approx([0.25, 0.75, 0.0]),
        "y": pytest.approx([1.0, 0.0, 0.0]),
    }
    whole = pytest.approx([1 / 6, 5 / 6, 0.0])
    assert coefficients(norms, whole=True) == {"x": whole, "y": whole}
    assert coefficients({"x": [0.0, 0.0]}) == {"x": [0.0, 0.0]}


@pytest.mark.parametrize("part", ["a", "b", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(part, bad):
    one = update(1, 3, bias=True)
    getattr(one, part).view(-1)[2] = bad
    with pytest.raises(NonFiniteError, match=r"x\.lora_.* of model one: found 1 non-finite"):
        change_norms([adapter("one", {"x": one})], "x", space="delta")
