"""`decompose`: a base and LoRAs of it, as PEFT reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mergekit_ext
from mergekit_ext import flexmerge
from mergekit_ext.cli import main
from mergekit_ext.errors import MergeWarning
from mergekit_ext.flexmerge import writer
from mergekit_ext.report.card import REPORT_NAME
from tests import models as small
from tests.host.flexmerge_models import TASKS, digests, tied_family
from tests.host.test_flexmerge_checks import report_of
from tests.reference import residual as naive

CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "vit": transformers.ViTForImageClassification,
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
}


def content(family, method="decompose", **parameters):
    return small.config(method, family.tuned, family.base, parameters)


def merge(given, out):
    mergekit_ext.merge(yaml.safe_dump(dict(given)), out, MergeOptions(quiet=True))
    return json.loads((out / REPORT_NAME).read_text())


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
    return {"input_ids": torch.arange(2, 14).view(2, 6)}


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**inputs(name)).logits


def loaded(out, task, name):
    config = transformers.AutoConfig.from_pretrained(out / task)
    base = CLASSES[name].from_pretrained(out / "base", config=config, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(base, out / task)


@pytest.mark.filterwarnings("error:::peft")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {"target_size": 1.7}),
        ("bert", {"vectors": "own", "embeddings": "own", "rank": 3}),
        ("bert", {"rank": 2}),
        ("gpt2", {"vectors": "own", "embeddings": "shared", "rank": 5}),
        ("vit", {"embeddings": "shared", "rank": 4, "exclude": "*layer.0.*"}),
    ],
)
def test_peft_gives_the_logits_of_the_checkpoint(name, given, families, tmp_path):
    family, given = families(name), {"vectors": "shared", **given}
    report = merge(content(family, **given), tmp_path / "out")
    if "rank" in given:
        stored = report_of(content(family, **given)).estimate.bytes_written
        files = (tmp_path / "out").rglob("*.safetensors")
        assert stored == sum(t.nbytes for file in files for t in load_file(file).values())
    other = {"algorithm": "residual", **given}
    again = merge(content(family, "flexmerge", **other), tmp_path / "checkpoint")
    assert report["tasks"] == again["tasks"]
    by_module = "target_size" in given
    assert ("llama.cpp scales" in (tmp_path / "out" / "README.md").read_text()) == by_module
    for task in TASKS:
        assert (
            "llama.cpp scales" in (tmp_path / "out" / task / "README.md").read_text()
        ) == by_module
        expected = logits(flexmerge.load(tmp_path / "checkpoint", task), name)
        found = logits(loaded(tmp_path / "out", task, name), name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_row_of_a_batch_is_its_own_loras(name, families, tmp_path, monkeypatch):
    embeddings = "shared" if name == "gpt2" else "low_rank"
    merge(content(families(name), rank=3, embeddings=embeddings), tmp_path / "out")
    for task, called in zip(TASKS, ("code", "law"), strict=False):
        (tmp_path / "out" / task).rename(tmp_path / "out" / called)
        config = json.loads((tmp_path / "out" / called / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"] == 3
        assert config["alpha_pattern"] == config["rank_pattern"]
        assert not config["modules_to_save"] and not config["lora_bias"]  # which vLLM refuses
    if name == "llama":  # a class of vLLM's
        assert "--max-lora-rank 8 " in (tmp_path / "out" / "README.md").read_text("utf-8")
    text = (Path(__file__).resolve().parents[2] / "docs" / "batches.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n((?:(?!```).)*adapter_name=.*?)```", text, re.DOTALL)
    rows = torch.randint(2, 14, (4, 6), generator=torch.Generator().manual_seed(0))
    names = {"peft": peft, "transformers": transformers, "prompts": {"input_ids": rows}}
    monkeypatch.chdir(tmp_path)
    exec(block, names)
    for row, task in enumerate(("law", "code", "law", "code")):
        expected = loaded(tmp_path / "out", task, name).eval()(input_ids=rows[row : row + 1]).logits
        torch.testing.assert_close(names["mixed"][row], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("output", ["adapters", "checkpoint"])
def test_full_ranks_bring_every_task_back(name, output, families, tmp_path):
    family, out = families(name), tmp_path / "out"
    given = {"vectors": "own", "embeddings": "own" if name == "bert" else "low_rank"}
    report = merge(content(family, rank=32, output=output, **given), out)
    assert max(found["error"] for found in report["tasks"].values()) < 1e-3
    for task, path in zip(TASKS, family.tuned, strict=True):
        found = loaded(out, task, name) if output == "adapters" else flexmerge.load(out, task)
        expected = CLASSES[name].from_pretrained(path)
        torch.testing.assert_close(
            logits(found, name), logits(expected, name), rtol=1e-4, atol=1e-5
        )


def test_servers_without_adapted_vocabularies_get_none(families, tmp_path):
    out = tmp_path / "out"
    merge(content(families("llama"), rank=2, embeddings="shared"), out)
    assert "target_size" not in (out / "README.md").read_text()
    for task in TASKS:
        names = load_file(out / task / "adapter_model.safetensors")
        assert names
        assert not any("embed" in name or "lm_head" in name for name in names)


def test_uniform_ranks_are_one_rank_for_every_reader(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    report = merge(content(family, target_size=1.8, uniform_rank=True), out)
    assert 1.6 < report["size"]["models"] <= 1.8
    _, states = family.states
    base = load_file(out / "base" / "model.safetensors")
    for task, state in zip(TASKS, states, strict=True):
        config = json.loads((out / task / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        rank = config["r"]
        assert config["lora_alpha"] == rank > 1
        tensors = load_file(out / task / "adapter_model.safetensors")
        for key, a in tensors.items():
            assert a.shape[1 if key.endswith(("lora_B.weight", "embedding_B")) else 0] == rank
        merged = loaded(out, task, "llama").merge_and_unload().state_dict()
        for name, theta_0 in base.items():
            if theta_0.dim() < 2:
                continue
            expected = naive.restored(state[name], theta_0.double(), rank, False)
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_smallest_uniform_size_has_every_matrix_at_the_multiple(families, tmp_path):
    family, given = families("llama"), {"uniform_rank": True, "rank_multiple": 20}
    (problem,) = report_of(content(family, target_size=1.0, **given)).problems
    least = float(problem.remedy.split()[1])
    report = merge(content(family, target_size=least, **given), tmp_path / "out")
    assert least - 1e-4 < report["size"]["models"] <= least


def test_plain_peft_loads_them_without_this_project(families, tmp_path):
    cases = {"llama": {"target_size": 1.6}, "vit": {"rank": 3, "vectors": "own"}}
    for name, given in cases.items():
        family = families(name)
        pair = small.config("decompose", family.tuned[:2], family.base, given)
        if name == "vit":
            with pytest.warns(MergeWarning, match="No LoRA can hold 2 of .*cls_token"):
                merge(pair, tmp_path / name)
        else:
            merge(pair, tmp_path / name)
        expected = {t: logits(loaded(tmp_path / name, t, name), name) for t in TASKS[:2]}
        save_file({**expected, **inputs(name)}, tmp_path / f"{name}.safetensors")
        assert not torch.allclose(expected[TASKS[0]], expected[TASKS[1]])
    program = f"""
import sys
sys.path[:] = [p for p in sys.path if p] + {[sysconfig.get_path("purelib")]!r}
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
for name, kind in [("llama", "LlamaForCausalLM"), ("vit", "ViTForImageClassification")]:
    stored = load_file(f"{{sys.argv[1]}}/{{name}}.safetensors")
    out = f"{{sys.argv[1]}}/{{name}}"
    given = {{k: stored.pop(k) for k in [*stored] if k not in {TASKS!r}}}
    model = getattr(transformers, kind).from_pretrained(f"{{out}}/base")
    first, second = stored
    model = PeftModel.from_pretrained(model, f"{{out}}/{{first}}", adapter_name=first)
    model.load_adapter(f"{{out}}/{{second}}", adapter_name=second)
    for task, expected in stored.items():
        model.set_adapter(task)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**given).logits, expected)
assert "mergekit_ext" not in sys.modules and "peft_merge" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_both_names_and_commands_give_the_same_bytes(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    (tmp_path / "d.yml").write_text(yaml.safe_dump(content(family, target_size=1.5)))
    done = CliRunner().invoke(main, ["decompose", str(tmp_path / "d.yml"), str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    expected = digests(out)
    shutil.rmtree(out)
    given = {"algorithm": "residual", "output": "adapters", "target_size": 1.5}
    merge(content(family, "flexmerge", **given), out)
    found = digests(out)
    assert {n for n in expected if found.pop(n) != expected[n]} == {
        "merge_report.json",  # which has the method's name
        "mergekit_config.yml",
    }
    assert not found or not {*found} - {*expected}


def test_the_command_takes_decompositions_only(families, tmp_path):
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(content(families("llama"), "flexmerge", target_size=2.0)))
    done = CliRunner().invoke(main, ["decompose", str(path), str(tmp_path / "out")])
    assert done.exit_code == 2 and "`algorithm: residual`" in done.output


def test_the_same_bytes_after_a_stop(families, tmp_path, monkeypatch):
    given = content(families("bert"), rank=2)
    merge(given, tmp_path / "out")
    expected = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    stock, made = writer.Shards.make, []

    def stopping(shards, piece):
        made.append(piece.key)
        if len(made) == 6:
            raise OSError("no space")
        stock(shards, piece)

    monkeypatch.setattr(writer.Shards, "make", stopping)
    with pytest.raises(Exception, match="no space"):
        merge(given, tmp_path / "out")
    written = []
    put = writer.Shards.write
    monkeypatch.setattr(writer.Shards, "write", lambda s, *a: written.append(a[1]) or put(s, *a))
    merge(given, tmp_path / "out")
    assert digests(tmp_path / "out") == expected
    tensors = [load_file(file) for file in (tmp_path / "out").rglob("*.safetensors")]
    assert 0 < len(written) < sum(map(len, tensors))


def test_the_report_is_what_was_lost(families, tmp_path):
    family, out = families("llama"), tmp_path / "out"
    report = merge(content(family, target_size=1.4), out)
    _, states = family.states
    base = load_file(out / "base" / "model.safetensors")
    for task, state in zip(TASKS, states, strict=True):
        made = loaded(out, task, "llama").merge_and_unload().state_dict()
        whole = left = 0.0
        for name, theta_0 in base.items():
            before = float((state[name].double() - theta_0.double()).square().sum())
            after = float((state[name].double() - made[name].double()).square().sum())
            whole, left = whole + before, left + after
            entry = report["tensors"][name][task]
            assert entry["error"] == pytest.approx((after / before) ** 0.5, abs=2e-3)
        assert report["tasks"][task]["error"] == pytest.approx((left / whole) ** 0.5, abs=2e-3)
        held = load_file(out / task / "adapter_model.safetensors")
        assert report["tasks"][task]["bytes"] == sum(t.nbytes for t in held.values())


def gpt_oss():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "initializer_range": 0.4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **heads, **experts))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["tied embeddings", "experts"])
def test_tied_and_stacked_weights_are_adapted(name, uniform, tmp_path):
    if name == "tied embeddings":
        family = tied_family(tmp_path / "models", ())
        kind, tuned, base, rank = CLASSES["llama"], family.tuned, family.base, 32
    else:
        rank, kind, (base, tuned) = (
            16,
            transformers.GptOssForCausalLM,
            small.family(tmp_path / "m", gpt_oss),
        )
    given = small.config("decompose", tuned, base, {"rank": rank, "uniform_rank": uniform})
    if name == "experts":
        with pytest.warns(MergeWarning, match="No LoRA can hold 3 of .*_bias"):
            report = merge(given, tmp_path / "out")
    else:
        report = merge(given, tmp_path / "out")
    for folder in tuned[:2]:
        plain, expected = (kind.from_pretrained(tmp_path / "out" / "base") for _ in range(2))
        states = kind.from_pretrained(folder).state_dict()
        with torch.no_grad():
            for weight, parameter in expected.named_parameters():
                if parameter.dim() > 1 and not weight.endswith(("_bias", "router.weight")):
                    parameter.copy_(states[weight])
        found = PeftModel.from_pretrained(plain, tmp_path / "out" / folder.name)
        torch.testing.assert_close(
            logits(found, "llama"), logits(expected, "llama"), rtol=1e-4, atol=1e-5
        )
        held = load_file(tmp_path / "out" / folder.name / "adapter_model.safetensors")
        spent = report["tasks"][folder.name]["bytes"]
        assert spent == sum(tensor.nbytes for tensor in held.values())


def test_tasks_have_classes_of_their_own(tmp_path):
    family, own = tied_family(tmp_path / "models", ()), tmp_path / "own"
    kind, out = transformers.LlamaForSequenceClassification, tmp_path / "out"
    kind.from_pretrained(family.tuned[0], num_labels=4, pad_token_id=0).save_pretrained(own)
    # Tied by the second class alone.
    with pytest.warns(MergeWarning, match="No LoRA can hold 1 of .*embed_tokens"):
        merge(small.config("decompose", [own, family.tuned[1]], family.base, {"rank": 8}), out)
    for task, name, head in (("own", kind, None), (TASKS[1], CLASSES["llama"], "CAUSAL_LM")):
        config = json.loads((out / task / "adapter_config.json").read_text())
        assert config["task_type"] == head
        assert "model.embed_tokens" not in config["target_modules"]
        assert f"{name.__name__}.from_pretrained" in (out / task / "README.md").read_text()


def test_a_task_that_is_the_base_has_an_adapter(families, tmp_path):
    family, start = families("llama"), tmp_path / "start"
    shutil.copytree(family.base, start)
    given = {"rank": 2, "base": "given"}
    merge(small.config("decompose", [start, family.tuned[0]], family.base, given), tmp_path / "out")
    expected = CLASSES["llama"].from_pretrained(family.base)
    found = logits(loaded(tmp_path / "out", "start", "llama"), "llama")
    torch.testing.assert_close(found, logits(expected, "llama"))


@pytest.mark.parametrize(
    ("given", "where", "words"),
    [
        ({"target_size": 0.9}, "parameters.target_size", "what can be reached: 1."),
        ({"target_size": 9.0}, "parameters.target_size", "what can be reached: 1."),
        ({"rank": 33}, "parameters.rank", "at most 32"),
        ({"rank": 4, "max_rank": 40}, "parameters.max_rank", "at most 32"),
        ({"rank": 4, "max_rank": 3}, "parameters.rank", "at most `max_rank`, 3"),
        ({"rank": 4, "rank_multiple": 8}, "parameters.rank", "a multiple of `rank_multiple`, 8"),
        ({}, "parameters", "one of target_size, rank, energy"),
        ({"algorithm": "ties", "target_size": 2.0}, "parameters.algorithm", "'residual'"),
        (
            {"rank": 4, "output": "checkpoint", "uniform_rank": True},
            "parameters.uniform_rank",
            "`output: adapters`",
        ),
        ({"rank": 4, "output": "folders"}, "parameters.output", "'checkpoint' or 'adapters'"),
    ],
)
def test_what_cannot_be_is_refused_beforehand(given, where, words, families):
    (problem,) = report_of(content(families("llama"), **given)).problems
    assert problem.where == where and words in problem.expected


def test_a_task_has_another_name_than_the_base(families):
    family = families("llama")
    given = content(family, rank=2)
    given["models"][0]["parameters"] = {"task": "Base"}
    (problem,) = report_of(given).problems
    assert "a task called 'Base'" in problem.found
