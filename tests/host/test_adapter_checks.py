"""What is said of adapters before a merge: refusals with reasons, ties, heads, other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_ext.errors import MergeWarning
from mergekit_ext.host.adapters.fitted import fit, read_adapter
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.io.headers import read_folder
from tests import models as small
from tests.host.adapters import check, quietly, saved_adapter, saved_base

PLAIN = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return saved_adapter(base, base.parent / "adapter", PLAIN, 1, LlamaForCausalLM)


def llama(**changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **depth, **changes}))


def tied_llama():
    return llama(tie_word_embeddings=True)


def merged(model, out, weight=1.0):
    """Merge one model as mergekit's command does."""
    models = [Path(name) for name in ([model] if isinstance(model, str) else model)]
    content = small.config("linear", models, None, {"weight": weight})
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(content)))
    run_merge(config, str(out), MergeOptions(quiet=True))
    return out


def edited(adapter: Path, folder: Path, **fields) -> Path:
    """A copy of an adapter with other fields in its configuration."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_nothing_to_say(base, adapter, tmp_path):
    report = check(f"{base}+{adapter}")
    assert report.problems == () and report.estimate is not None
    report = check(f"{base}+{adapter}", lora_merge_cache=str(tmp_path))
    assert report.problems == ()
    assert any("is not used: adapters" in note for note in report.notes)


def test_all_problems_of_all_adapters(base, adapter, tmp_path):
    broken = edited(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    dora = edited(adapter, tmp_path / "dora", use_dora=True)
    report = check(f"{base}+{broken}", f"{base}+{dora}", f"{base}+{tmp_path / 'brokem'}")
    found = {problem.where.split(" ")[0]: problem for problem in report.problems}
    assert found.keys() == {"models[0].model", "models[1].model", "models[2].model"}
    assert "DoRA" in found["models[1].model"].found
    assert "MERGEKIT_EXT_ADAPTERS=0" in found["models[1].model"].remedy
    assert "MERGEKIT_EXT_ADAPTERS" not in found["models[0].model"].remedy
    assert "Did you mean" in found["models[2].model"].remedy


def test_an_adapter_of_another_base(base, adapter, tmp_path):
    sizes = {"hidden_size": 16, "num_key_value_heads": 2}
    llama(**sizes, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    problems = check(f"{tmp_path / 'other'}+{adapter}").problems
    assert len(problems) == 3
    assert all("shape" in problem.found for problem in problems)
    llama(**sizes).save_pretrained(tmp_path / "shorter")
    problems = check(f"{tmp_path / 'shorter'}+{adapter}").problems
    assert any("without a tensor" in problem.found for problem in problems)


def test_an_adapter_that_names_another_base(base, adapter, tmp_path):
    """Which its shapes do not show: a warning, before the merge as well."""
    assert not any("names" in note for note in check(f"{base}+{adapter}").notes)
    other = edited(adapter, tmp_path / "other", base_model_name_or_path="org/another")
    report = check(f"{base}+{other}")
    assert report.problems == ()
    (note,) = [note for note in report.notes if "org/another" in note]
    assert str(base) in note
    with pytest.warns(MergeWarning, match="org/another"):
        merged(f"{base}+{other}", tmp_path / "out")
    copy = tmp_path / "models--org--another" / "snapshots" / "1f"
    shutil.copytree(base, copy)
    assert not any("names" in note for note in check(f"{copy}+{other}").notes)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {},
    ],
    ids=["saved", "lora", "resized"],
)
def test_a_vocabulary_that_grew(base, fields, tmp_path):
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "grown")
    lora = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    quietly(lambda: get_peft_model(model, lora).save_pretrained(tmp_path / "adapter"))
    problems = check(f"{base}+{tmp_path / 'adapter'}").problems
    assert len(problems) == 2  # the embedding and the head
    assert all("(70, 32)" in p.found and "Resize the base" in p.remedy for p in problems)
    assert check(f"{tmp_path / 'grown'}+{tmp_path / 'adapter'}").problems == ()


def test_flexmerge_is_reported_too(base, adapter, tmp_path):
    dora = edited(adapter, tmp_path / "dora", use_dora=True)
    content = small.config(
        "flexmerge", [f"{base}+{adapter}", f"{base}+{dora}"], base, {"target_size": 1.5}
    )
    ((_, report),) = check_source(yaml.safe_dump(content), MergeOptions())
    (problem,) = report.problems
    assert "DoRA" in problem.found


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_use_of_a_tied_tensor(target, tmp_path):
    base = saved_base(tmp_path / "base", tied_llama)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[target])
    saved = saved_adapter(base, tmp_path / "saved", config, 1, LlamaForCausalLM)
    (problem,) = check(f"{base}+{saved}").problems
    assert "ties" in problem.found
    assert "tie_word_embeddings=False" in problem.remedy
    # Not tied in this class: only the head could be tied.
    headless = LlamaConfig.from_pretrained(base)
    headless.architectures = ["LlamaModel"]
    tensors = read_folder(base)
    assert fit(read_adapter(SimpleNamespace(path=str(saved), revision=None)), tensors, headless)


def test_an_embedding_that_is_not_tied_is_adapted(base, tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    adapter = saved_adapter(base, tmp_path / "adapter", config, 1, LlamaForCausalLM)
    assert check(f"{base}+{adapter}").problems == ()


def test_a_quantised_base(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file, {"format": "pt"})
    problems = check(f"{tmp_path / 'int8'}+{adapter}").problems
    assert any(problem.where.startswith(f"models[0].model ({name})") for problem in problems)


def test_a_head_that_the_architecture_does_not_have(base, tmp_path):
    kind = transformers.LlamaForSequenceClassification
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    with_head = saved_adapter(base, tmp_path / "classifier", config, 1, kind)
    (problem,) = check(f"{base}+{with_head}").problems
    assert "score.weight" in problem.found
    assert "override_architecture" in problem.remedy


def test_a_head_that_only_the_adapters_have(tmp_path):
    """A pretrained encoder under its classifier's name: the head comes with the adapters."""
    base = saved_base(tmp_path / "base", small.bert)
    file = base / "model.safetensors"
    body = {n: t for n, t in load_file(file).items() if not n.startswith("classifier.")}
    save_file(body, file, {"format": "pt"})
    kind = transformers.BertForSequenceClassification
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = [saved_adapter(base, tmp_path / f"a{seed}", lora, seed, kind) for seed in range(2)]
    models = [f"{base}+{path}" for path in adapters]
    assert check(*models).problems == ()
    out = merged(models, tmp_path / "out", 0.5)
    heads = [load_file(path / "adapter_model.safetensors") for path in adapters]
    name = "classifier.weight"
    wanted = sum(head[f"base_model.model.{name}"] for head in heads) / 2
    torch.testing.assert_close(small.state(out)[name], wanted)


@pytest.mark.only_checked("what is downloaded is counted")
def test_adapters_on_the_hub(base, adapter, monkeypatch):
    """A cached one is checked; another is not downloaded for a check."""
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cached = {"somebody/adapter": str(adapter / "adapter_config.json")}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, *_, **__: cached.get(name)
    )
    assert check(f"{base}+somebody/adapter@v2").problems == ()
    assert asked == [("somebody/adapter", "v2")]
    (problem,) = check(f"{base}+somebody/other").problems
    assert "which does not exist" in problem.found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    report = check(f"{base}+somebody/other")
    assert report.problems == ()
    assert any("somebody/other is checked when" in note for note in report.notes)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["embed_tokens"]}, {}], ids=["saved", "lora"]
)
def test_a_tied_tensor_trained_tied(fields, tmp_path):
    """`ensure_weight_tying`: the change is that of the tensor, in all its uses."""
    base = saved_base(tmp_path / "base", tied_llama)
    targets = ["q_proj"] if fields else ["q_proj", "embed_tokens"]
    lora = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=True, **fields)
    adapter = saved_adapter(base, tmp_path / "adapter", lora, 1, LlamaForCausalLM)
    model = f"{base}+{adapter}"
    assert check(model).problems == ()
    whole = LlamaForCausalLM.from_pretrained(merged(model, tmp_path / "out")).eval()
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    tokens = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(
            whole(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_a_configuration_that_is_too_long_is_not_read(base, adapter, tmp_path, monkeypatch):
    folder = edited(adapter, tmp_path / "long")
    with (folder / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 40)
    for way in ("1", "0"):
        monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", way)
        found = [problem.found for problem in check(f"{base}+{folder}").problems]
        assert any("bytes, more than" in text for text in found)


@pytest.mark.parametrize(
    "content", ["{}", '{"peft_type": null}', '{"peft_type": "OWN"}', "[1]", "7", "{"]
)
def test_a_configuration_that_mergekits_own_way_cannot_read(
    content, base, adapter, tmp_path, monkeypatch
):
    """Refused before the whole model is loaded, which PEFT would be applied to."""
    monkeypatch.setenv("MERGEKIT_EXT_ADAPTERS", "0")
    cache = str(tmp_path / "cache")
    assert check(f"{base}+{adapter}", lora_merge_cache=cache).problems == ()
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text(content)
    (problem,) = check(f"{base}+{tmp_path / 'broken'}", lora_merge_cache=cache).problems
    assert "adapter_config.json" in problem.found
