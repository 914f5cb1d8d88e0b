"""A whole merge gives the same bytes with any number of threads."""

from __future__ import annotations

import pytest
import torch
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

import mergekit_ext
from tests import models as small
from tests.kernels.threads import with_any_number_of_threads


def llama():
    """Of matrices that several threads share."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=301,
            hidden_size=136,
            intermediate_size=261,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return small.family(tmp_path_factory.mktemp("llama"), llama)


@pytest.mark.parametrize(
    ("method", "based", "parameters"),
    [
        ("lore", False, {"mu_relative": 0.5, "max_iterations": 4, "tolerance": 1e-2}),
        ("nan_ties", True, {"density": 0.4, "rescale": True}),
        ("nan_dare_ties", True, {"density": 0.4}),
        ("nan_della_linear", True, {"density": 0.4, "epsilon": 0.1}),
        ("flexmerge", True, {"target_size": 2.0, "algorithm": "tsv_m"}),
        (
            "flexmerge",
            True,
            {"target_size": 1, "algorithm": "mergekit:ties", "weight": 1},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.NotConvergedWarning")
def test_whole_merges(llamas, tmp_path, method, based, parameters):
    base, tuned = llamas
    config = small.write_yaml(
        tmp_path / "merge.yml", small.config(method, tuned, base if based else None, parameters)
    )
    outs = []

    def work():
        outs.append(tmp_path / f"out{len(outs)}")
        mergekit_ext.merge(config, outs[-1], MergeOptions(quiet=True))
        files = sorted(outs[-1].rglob("*.safetensors"))
        assert files
        return {str(file.relative_to(outs[-1])): file.read_bytes() for file in files}

    with_any_number_of_threads(work)
    assert all(torch.isfinite(tensor).all() for tensor in small.state(outs[0]).values())
