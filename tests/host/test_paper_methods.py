"""`tsv_m`, `pcb` and `emr` as mergekit methods. What they compute is tested in kernels."""

from __future__ import annotations

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from pydantic import ValidationError

import mergekit_ext
from mergekit_ext.errors import MergeError
from tests import models as small
from tests.reference import emr as reference_emr
from tests.reference import isotropic
from tests.reference import pcb as reference_pcb
from tests.reference import tsv as reference_tsv

mergekit_ext.register()


def pcb(deltas, density=0.1):
    return reference_pcb.merge(deltas, density, 1e-4).reshape(deltas[0].shape)


REFERENCES = {
    "tsv_m": reference_tsv.merge,
    "iso_c": isotropic.iso_c,
    "iso_cts": isotropic.iso_cts,
    "pcb": pcb,
    "emr": reference_emr.unified,
}
METHODS = pytest.mark.parametrize("method", REFERENCES)


def models(count=3, shape=(12, 9), dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = [
        base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(count)
    ]
    return [t.to(dtype) for t in (base, *tuned)]


@METHODS
@pytest.mark.parametrize("shape", [(12, 9), (30,), ()], ids=str)
def test_weights_and_lambda(method, shape):
    base, *tuned = models(shape=shape)
    weights = [1.0, 0.4, -0.5]
    found = merge_tensors(
        [base, *tuned], method, base_index=0, parameters={"weight": weights, "lambda": 0.7}
    )
    deltas = [w * (t - base) for w, t in zip(weights, tuned, strict=True)]
    wanted = base + 0.7 * REFERENCES[method](deltas)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_density_of_pcb():
    base, *tuned = models()
    found = merge_tensors([base, *tuned], "pcb", base_index=0, parameters={"density": 0.6})
    wanted = base + pcb([t - base for t in tuned], 0.6)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@METHODS
def test_half_precision_is_computed_in_float32_and_cast_once(method):
    base, *tuned = models(dtype=torch.bfloat16)
    found = merge_tensors([base, *tuned], method, base_index=0, parameters={"lambda": 1.0})
    wanted = base.double() + REFERENCES[method]([t.float() - base.float() for t in tuned])
    assert found.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert torch.all((found.double() - wanted).abs() <= 0.51 * eps * wanted.abs() + 1e-5)


def test_layouts_of_tsv_m():
    base, *tuned = models(shape=(2, 6, 5))
    published = {"base_index": 0, "parameters": {"lambda": 1.0}}
    experts = merge_tensors([base, *tuned], "tsv_m", name="mlp.experts.w", **published)
    for index in range(2):
        wanted = reference_tsv.merge([t[index] - base[index] for t in tuned]) + base[index]
        torch.testing.assert_close(experts[index], wanted, rtol=1e-9, atol=1e-9)
    convolution = merge_tensors([base, *tuned], "tsv_m", name="conv1.weight", **published)
    wanted = reference_tsv.merge([(t - base).reshape(2, 30) for t in tuned]).reshape(base.shape)
    torch.testing.assert_close(convolution, base + wanted, rtol=1e-9, atol=1e-9)


@METHODS
def test_the_base_is_required(method):
    with pytest.raises(ValueError, match="base"):
        merge_tensors(models()[1:], method)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pcb", {"density": 0.0}),
        ("pcb", {"density": 1.5}),
        ("emr", {"lambda": float("nan")}),
        ("tsv_m", {"weight": float("inf")}),
    ],
    ids=str,
)
def test_bad_values_are_refused(method, parameters):
    with pytest.raises(ValidationError):
        merge_tensors(models(), method, base_index=0, parameters=parameters)


@METHODS
def test_leaving_the_range_is_reported(method):
    base = torch.full((4, 4), 1.0, dtype=torch.float16)
    tuned = base + torch.eye(4, dtype=torch.float16)
    with pytest.raises(MergeError, match=r"w: .* not finite"):
        merge_tensors([base, tuned], method, base_index=0, parameters={"lambda": 1e6}, name="w")


@METHODS
def test_under_nan_coefficients(method):
    base, *tuned = models()
    found = merge_tensors([base, *tuned], f"nan_{method}", base_index=0, parameters={"scale": 2.0})
    inverse = [1 / float((t - base).norm()) for t in tuned]
    weighted = [(t - base) * i / sum(inverse) for t, i in zip(tuned, inverse, strict=True)]
    wanted = base + 2 * REFERENCES[method](weighted)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("llama"), small.llama, amounts=(0.02, 0.04))


@METHODS
def test_mergekit_yaml(method, family, tmp_path):
    base, tuned = family
    yml = small.write_yaml(
        tmp_path / "merge.yml", small.config(method, tuned, base, {"lambda": 0.5})
    )
    done = small.command_here("mergekit-yaml", yml, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    start, states = small.state(base), [small.state(t) for t in tuned]
    found = small.state(tmp_path / "out")
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        deltas = [s[name] - start[name] for s in states]
        wanted = start[name].double() + 0.5 * REFERENCES[method](deltas)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-5, msg=name)
