"""LoRAs of full fine-tunes, loaded by plain PEFT on plain transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_ext.errors import ConfigError, MergeError, MergeWarning, NonFiniteError
from peft_merge import extract, load_adapter
from peft_merge.cli import main
from tests.peft_merge import models

_TOKENS = {"input_ids": torch.arange(14).view(2, 7)}
_PIXELS = {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}


def vit() -> nn.Module:
    sizes = {name: value for name, value in models._SIZES.items() if name != "vocab_size"}
    own = {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 3}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **own))


def gpt_oss() -> nn.Module:
    sizes = {**models._SIZES, **models._HEADS, "num_hidden_layers": 1, "head_dim": 4}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts))


def tuned(base: nn.Module, spread: float = 0.1) -> nn.Module:
    """Return a copy whose parameters have all changed."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def saved(place, make=models.llama):
    """Save a base and a fine-tune, and return the latter."""
    torch.manual_seed(0)
    base = make()
    base.save_pretrained(place / "base")
    model = tuned(base)
    model.save_pretrained(place / "model")
    return model


def answer(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def with_adapter(base: nn.Module, folder) -> nn.Module:
    """What PEFT makes of the adapter, for which it has no other tensors than these."""
    return PeftModel.from_pretrained(base, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (models.llama, _TOKENS),
        (models.tied_llama, _TOKENS),
        (models.gpt2, _TOKENS),
        (models.bert, _TOKENS),
        (gpt_oss, _TOKENS),
        (vit, _PIXELS),
    ],
)
def test_at_full_rank_the_fine_tune_comes_back(tmp_path, make, inputs):
    model = saved(tmp_path, make)
    result = extract(
        tmp_path / "base", tmp_path / "model", tmp_path / "out", rank=64, vectors="own"
    )
    base = type(model).from_pretrained(tmp_path / "base")
    # Vectors of experts, and of attention, are in no module that holds nothing else.
    assert not result.report["left"] or make is gpt_oss
    with torch.no_grad():
        for name in result.report["left"]:
            model.get_parameter(name).copy_(base.get_parameter(name))
    expected = answer(model, inputs)
    found = answer(with_adapter(base, tmp_path / "out"), inputs)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_energy_and_error_are_those_of_the_dense_change(tmp_path):
    model = saved(tmp_path)
    result = extract(tmp_path / "base", tmp_path / "model", energy=0.8)
    base = models.llama().from_pretrained(tmp_path / "base")
    rest = whole = 0.0
    for module, entry in result.report["modules"].items():
        weight = model.get_submodule(module).weight - base.get_submodule(module).weight
        change = weight.detach().double().T if "embed" in module else weight.detach().double()
        left = change
        if entry["rank"]:
            left = change - result.adapter.load(module).dense()[0]
        assert entry["error"] == pytest.approx(float(left.norm() / change.norm()), rel=2e-3)
        rest, whole = rest + float(left.norm()) ** 2, whole + float(change.norm()) ** 2
    assert 0.17 < rest / whole < 0.2002
    assert result.report["summary"]["error"] == pytest.approx((rest / whole) ** 0.5, rel=1e-3)
    assert len({entry["rank"] for entry in result.report["modules"].values()}) > 2


@pytest.mark.parametrize("size", ["12kB", 0.5])
def test_a_size_is_spent(tmp_path, size):
    saved(tmp_path)
    result = extract(tmp_path / "base", tmp_path / "model", tmp_path / "out", size=size)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    spent = sum(tensor.nbytes for tensor in stored)
    whole = sum(
        tensor.nbytes for tensor in load_file(tmp_path / "model" / "model.safetensors").values()
    )
    limit = 12_000 if size == "12kB" else whole / 2
    assert limit - 4 * (32 + 16) < spent <= limit
    assert spent == result.report["summary"]["bytes"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["r"] == config["lora_alpha"]
    assert "llama.cpp scales" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_left_is_said(tmp_path):
    model = saved(tmp_path)
    done = CliRunner().invoke(
        main, ["extract", *(str(tmp_path / name) for name in ("base", "model", "out")), "--rank=2"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert {*report["left"]} == {n for n, _ in model.named_parameters() if "norm" in n}
    assert f"{report['summary']['left']:.2%} of the squared norm" in done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Left as in the base" in card
    assert "llama.cpp scales" not in card
    assert load_adapter(tmp_path / "out").infos["lm_head"].rank == 2


@pytest.mark.filterwarnings("ignore")
def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_fields_of_the_configuration_that_differ(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "model", rms_norm_eps=1e-3)
    with pytest.warns(MergeWarning, match="no adapter holds: rms_norm_eps 0.001 in place of 1e-06"):
        result = extract(tmp_path / "base", tmp_path / "model", rank=1)
    assert any("rms_norm_eps" in note for note in result.report["notes"])
    edit(tmp_path / "model", hidden_act="gelu")
    with pytest.raises(ConfigError, match="hidden_act: found 'gelu', and 'silu' in the base"):
        extract(tmp_path / "base", tmp_path / "model", rank=1)


def test_a_head_that_the_base_lacks_is_saved_whole(tmp_path):
    model = saved(tmp_path, models.bert)
    transformers.BertModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "body")
    options = {"rank": 64, "vectors": "own"}
    result = extract(tmp_path / "body", tmp_path / "model", tmp_path / "out", **options)
    assert "classifier.weight" in result.report["whole_tensors"]
    base = type(model).from_pretrained(tmp_path / "body", num_labels=3)
    found = answer(with_adapter(base, tmp_path / "out"), _TOKENS)
    assert torch.allclose(found, answer(model, _TOKENS), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_grew(tmp_path):
    saved(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(36)
    model = tuned(base)
    model.save_pretrained(tmp_path / "grown")
    options = {"rank": 64, "vectors": "own"}
    result = extract(tmp_path / "base", tmp_path / "grown", tmp_path / "out", **options)
    assert result.report["reshaped"] == ["model.embed_tokens.weight", "lm_head.weight"]
    found = answer(with_adapter(base, tmp_path / "out"), _TOKENS)
    assert torch.allclose(found, answer(model, _TOKENS), atol=1e-4)


def test_mistakes_are_found_together(tmp_path):
    saved(tmp_path)
    torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    with pytest.raises(ConfigError) as caught:
        extract(
            tmp_path / "nowhere", tmp_path, tmp_path / "base", rank=0, size="small", vectors="x"
        )
    text = str(caught.value)
    for part in ("rank and size", "rank: found 0", "size: found 'small'", "vectors: found 'x'"):
        assert part in text
    for part in ("which is not empty", "no such folder", "a pickle"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (models.mixtral, "experts one by one"),
        (models.tied_llama, "layers.1.self_attn.q_proj.weight"),  # fewer layers
    ],
)
def test_models_that_do_not_fit(tmp_path, make, part):
    saved(tmp_path)
    other = make()
    other.save_pretrained(tmp_path / "other")
    pair = (tmp_path / "base", tmp_path / "other")
    with pytest.raises(ConfigError, match=part):
        extract(*(pair if make is models.mixtral else reversed(pair)), rank=1)


@pytest.mark.parametrize(
    ("size", "vectors", "part"),
    [
        ("100B", "own", "what is saved whole takes 320"),
        ("10B", "base", "found 10 bytes.*expected at least 96, for one rank"),
        (5, "base", "found 5 models; expected at most 1.*50MB"),
    ],
)
def test_a_size_that_holds_nothing_or_more_than_the_model(tmp_path, size, vectors, part):
    saved(tmp_path)
    with pytest.raises(ConfigError, match=part):
        extract(tmp_path / "base", tmp_path / "model", size=size, vectors=vectors)


def test_what_vllm_refuses_is_said(tmp_path):
    saved(tmp_path)
    for vectors in ("base", "own"):
        out = tmp_path / f"lora_{vectors}"
        extract(tmp_path / "base", tmp_path / "model", out, rank=2, vectors=vectors)
        assert ("vLLM refuses them" in (out / "README.md").read_text()) == (vectors == "own")


def test_weights_that_stop_it(tmp_path):
    saved(tmp_path)
    with pytest.raises(MergeError, match="every matrix is as in"):
        extract(tmp_path / "base", tmp_path / "base", rank=1)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight of model"):
        extract(tmp_path / "base", tmp_path / "model", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
