"""The installed stock commands on real models, tensor by tensor against the reference."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from mergekit_ext.host.blocks import block_of
from tests import models as small
from tests.reference import nan as reference
from tests.reference.lore import lore as reference_lore

EPS = {torch.float32: 3e-6, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Families by architecture."""

    @cache
    def made(name):
        return small.family(tmp_path_factory.mktemp(name), small.ARCHITECTURES[name])

    return made


@pytest.fixture(scope="module")
def llamas(family):
    return family("llama")


@pytest.fixture(scope="module")
def half_llamas(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("half"), small.llama, torch.bfloat16)


def run(tmp_path, config, *flags, command="mergekit-yaml"):
    yml = small.write_yaml(tmp_path / "merge.yml", config)
    return small.command_here(command, yml, tmp_path / "out", *flags)


def run_installed(tmp_path, config, **env):
    """In a process of its own, which takes seconds to load."""
    yml = small.write_yaml(tmp_path / "merge.yml", config)
    return small.command("mergekit-yaml", yml, tmp_path / "out", env=env)


def compare(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(), wanted[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("architecture", small.ARCHITECTURES)
def test_nan_per_model(family, tmp_path, architecture):
    base, tuned = family(architecture)
    config = small.config("nan", tuned, base, {"granularity": "model"})
    done = run(tmp_path, config)
    assert done.returncode == 0, done.stderr
    found = small.state(tmp_path / "out")
    assert found.keys() == small.state(base).keys()
    wanted = reference.merge(
        [small.state(t) for t in tuned], small.state(base), group_of=lambda name: "all"
    )
    compare(found, wanted, EPS[torch.float32])
    assert "Measuring" in done.stderr


def test_nan_ties(family, tmp_path):
    base, tuned = family("bert")
    config = small.config("nan_ties", tuned, base, {"density": 0.5, "granularity": "block"})
    done = run(tmp_path, config, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "tensor/s" not in done.stderr
    wanted = reference.merge(
        [small.state(t) for t in tuned],
        small.state(base),
        group_of=block_of,
        combine=reference.ties(0.5),
    )
    compare(small.state(tmp_path / "out"), wanted, EPS[torch.float32])


def test_lore(family, tmp_path):
    _, tuned = family("t5")
    config = small.config("lore", tuned, None, {"mu_relative": 0.3, "lambda": 0.5})
    done = run(tmp_path, config)
    assert done.returncode == 0, done.stderr
    states = [small.state(t) for t in tuned]
    found = small.state(tmp_path / "out")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        inputs = [s[name] for s in states]
        mean = sum(t.double() for t in inputs) / len(inputs)
        wanted = mean
        if tensor.ndim == 2:
            wanted = reference_lore(inputs, mu_relative=0.3, lam=0.5).merged
        allowed = 1e-4 * (wanted - mean).norm() + 1e-6 * wanted.norm()
        assert (tensor.double() - wanted).norm() <= allowed, name


def test_half_precision(half_llamas, tmp_path):
    base, tuned = half_llamas
    done = run(tmp_path, small.config("nan", tuned, base, out_dtype="float32"))
    assert done.returncode == 0, done.stderr
    found = small.state(tmp_path / "out")
    wanted = reference.merge([small.state(t) for t in tuned], small.state(base))
    assert {t.dtype for t in found.values()} == {torch.float32}
    compare(found, wanted, EPS[torch.float32])


def test_half_precision_lore(half_llamas, tmp_path):
    base, tuned = half_llamas
    done = run(tmp_path, small.config("lore", tuned, base, {"rank_ratio": 0.2, "lambda": 0.5}))
    assert done.returncode == 0, done.stderr
    base_state, states = small.state(base), [small.state(t) for t in tuned]
    for name, tensor in small.state(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        inputs = [s[name] for s in states]
        wanted = sum(t.double() for t in inputs) / len(inputs)
        if tensor.ndim == 2:
            wanted = reference_lore(inputs, base=base_state[name], rank_ratio=0.2, lam=0.5).merged
        torch.testing.assert_close(tensor.double(), wanted, rtol=2**-8, atol=1e-5, msg=name)


def test_the_output_is_a_model_with_its_coefficients(llamas, tmp_path):
    base, tuned = llamas
    events = tmp_path / "events.jsonl"
    done = run_installed(
        tmp_path,
        small.config("nan", tuned, base, {"granularity": "model"}),
        MERGEKIT_EXT_EVENTS=str(events),
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    _, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    card = (out / "README.md").read_text()
    assert "### NAN coefficients" in card
    norms = [
        reference.frobenius([s[n] - b for n, b in small.state(base).items()])
        for s in map(small.state, tuned)
    ]
    wanted = reference.coefficients(norms)
    assert all(f"{value:.4f}" in card for value in wanted)
    seen = [json.loads(line) for line in events.read_text().splitlines()]
    kinds = [record["event"] for record in seen]
    assert kinds[0] == "merge_begin"
    assert kinds[-1] == "merge_end"
    assert kinds.count("tensor_merged") == seen[0]["tensors"] == len(small.state(base))
    (statistics,) = (record for record in seen if record["event"] == "statistics_end")
    assert list(statistics["coefficients"]["model"].values()) == pytest.approx(wanted, rel=1e-5)
    report = json.loads((out / "merge_report.json").read_text())
    assert report["tensors"].keys() == small.state(base).keys()


def test_gradients_filters_and_slices(llamas, tmp_path):
    base, tuned = llamas
    layers = 3
    config = {
        "merge_method": "nan",
        "base_model": str(base),
        "slices": [
            {
                "sources": [
                    {
                        "model": str(model),
                        "layer_range": [0, layers],
                        "parameters": {
                            "weight": [
                                {"filter": "mlp", "value": [0.0, 1.0]},
                                {"value": 0.5},
                            ]
                        },
                    }
                    for model in tuned
                ]
                + [{"model": str(base), "layer_range": [0, layers]}]
            }
        ],
        "parameters": {"scale": 1.0},
    }
    done = run(tmp_path, config)
    assert done.returncode == 0, done.stderr
    base_state, states = small.state(base), [small.state(t) for t in tuned]
    for name, tensor in small.state(tmp_path / "out").items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        weight = layer / (layers - 1) if "mlp" in name else 0.5
        wanted = reference.merge(
            [{name: s[name]} for s in states],
            {name: base_state[name]},
            weights=[weight] * 3,
            scale=1.0,
        )
        compare({name: tensor}, wanted, EPS[torch.float32])


def test_slices_of_different_models_have_coefficients_of_their_own(llamas, tmp_path):
    base, tuned = llamas
    first, second, third = tuned

    def part(start, end, *models):
        sources = [{"model": str(m), "layer_range": [start, end]} for m in (*models, base)]
        return {"sources": sources}

    config = {
        "merge_method": "nan",
        "base_model": str(base),
        "slices": [part(0, 2, first, second), part(2, 3, first, third)],
        "parameters": {"granularity": "model", "scale": "paper"},
    }
    done = run(tmp_path, config)
    assert done.returncode == 0, done.stderr
    found, base_state = small.state(tmp_path / "out"), small.state(base)
    for layers, models in (({"0", "1"}, (first, second)), ({"2"}, (first, third))):
        names = [n for n in found if "layers" in n and n.split(".")[2] in layers]
        outside = [n for n in found if "layers" not in n]
        # Norm and head go with the last slice, the embedding with the first.
        last = third in models
        names += [n for n in outside if ("embed" not in n) == last]
        wanted = reference.merge(
            [{n: small.state(m)[n] for n in names} for m in models],
            {n: base_state[n] for n in names},
            group_of=lambda name: "all",
        )
        compare({n: found[n] for n in names}, wanted, EPS[torch.float32])


def test_a_tied_head_counts_once(tmp_path):
    def tied():
        model = small.llama()
        model.config.tie_word_embeddings = True
        return type(model)(model.config)

    base, tuned = small.family(tmp_path / "tied", tied)
    assert "lm_head.weight" not in small.state(base)
    done = run(tmp_path, small.config("nan", tuned, base, {"granularity": "model"}))
    assert done.returncode == 0, done.stderr
    wanted = reference.merge(
        [small.state(t) for t in tuned], small.state(base), group_of=lambda name: "all"
    )
    found = small.state(tmp_path / "out")
    compare({n: found[n] for n in wanted}, wanted, EPS[torch.float32])


def test_an_output_never_replaces_an_input(llamas, tmp_path):
    base, tuned = llamas
    weights = tuned[0] / "model.safetensors"
    before = weights.read_bytes()
    yml = small.write_yaml(tmp_path / "merge.yml", small.config("nan", tuned, base))
    done = small.command_here("mergekit-yaml", yml, tuned[0])
    assert done.returncode == 2
    assert "where the input" in done.stderr
    assert weights.read_bytes() == before


def test_multi_merge_feeds_one_merge_to_the_next(llamas, tmp_path):
    base, tuned = llamas
    first = small.write_yaml(
        tmp_path / "a.yml", {"name": "first", **small.config("nan", tuned[:2], base)}
    ).read_text()
    second = small.write_yaml(
        tmp_path / "b.yml", small.config("lore", ["first", *tuned], None, {"mu_relative": 0.5})
    ).read_text()
    (tmp_path / "merge.yml").write_text(first + "---\n" + second)
    places = ("--out-path", tmp_path / "out", "-I", tmp_path / "parts")
    done = small.command_here("mergekit-multi", tmp_path / "merge.yml", *places)
    assert done.returncode == 0, done.stderr
    merged = reference.merge([small.state(t) for t in tuned[:2]], small.state(base))
    compare(small.state(tmp_path / "parts" / "first"), merged, EPS[torch.float32])
    assert small.state(tmp_path / "out").keys() == small.state(base).keys()
