"""Models that share their tensors: the right values, the same storage, no more memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mergekit_ext.errors import CheckpointError
from mergekit_ext.flexmerge import load
from tests.flexmerge.handmade import edited, models, vit, write
from tests.flexmerge.test_task_folders import linked_copy
from tests.models import bert, llama, t5

TASKS = ["a", "b", "c", "d"]


def mixtral() -> transformers.PreTrainedModel:
    """transformers stacks the experts of a layer when it loads one."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    )


def tied_llama() -> transformers.PreTrainedModel:
    model = llama()
    return type(model)(transformers.LlamaConfig(**model.config.to_dict() | TIED))


TIED = {"tie_word_embeddings": True}

# Which tensors are private to each task, and what the model is fed with.
KINDS: dict[str, tuple[Callable[[], Any], str, Callable[[], dict[str, Tensor]]]] = {
    "bert": (bert, "classifier", lambda: {"input_ids": torch.arange(8)[None]}),
    "vit": (vit, "classifier", lambda: {"pixel_values": torch.ones(1, 3, 8, 8)}),
    "llama": (llama, "lm_head", lambda: {"input_ids": torch.arange(8)[None]}),
    "tied llama": (tied_llama, "model.norm.", lambda: {"input_ids": torch.arange(8)[None]}),
    "t5": (
        t5,
        "encoder.final_layer_norm",
        lambda: {"input_ids": torch.arange(8)[None], "decoder_input_ids": torch.arange(3)[None]},
    ),
    "mixtral": (mixtral, "lm_head", lambda: {"input_ids": torch.arange(8)[None]}),
}
MLP = {
    "bert": "intermediate",
    "vit": "mlp",
    "llama": "mlp",
    "tied llama": "mlp",
    "t5": "densereludense",
    "mixtral": "experts",
}


def dense(block: str) -> list[tuple[list[str], str]]:
    """Two pairs in the attention blocks, three and one elsewhere."""
    if "attention" in block:
        return [(["a", "b"], "dense"), (["c", "d"], "dense")]
    return [(["a", "b", "c"], "dense"), (["d"], "dense")]


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    make, private, _ = KINDS[request.param]
    folder = tmp_path_factory.mktemp("runtime")
    base, paths = models(folder, make, TASKS)
    write(folder / "out", base, paths, dense, private)
    return folder / "out", request.param


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        inputs = {name: value.to(model.device) for name, value in KINDS[kind][2]().items()}
        return model(**inputs).logits


def independent(out: Path, task: str, **options: Any) -> Any:
    """What transformers makes of a task's folder, with no code of ours."""
    name = json.loads((out / task / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(out / task, **options)


def same(first: Any, second: Any, part: str) -> set[bool]:
    """Of the parameters whose names hold `part`: is the storage the same?"""
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    found = {p.data_ptr() == q.data_ptr() for (name, p), (_, q) in pairs if part in name.lower()}
    assert found, f"no parameter is called {part}"
    return found


def test_each_model_is_what_its_folder_is(made: tuple[Path, str]) -> None:
    out, kind = made
    loaded = load(out)
    assert list(loaded) == TASKS
    results = []
    for task, model in loaded.items():
        other = independent(out, task)
        assert type(model) is type(other)
        assert not model.training
        theirs = other.state_dict()
        assert set(model.state_dict()) == set(theirs)
        for name, value in model.state_dict().items():
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype
        for (name, buffer), (_, theirs_too) in zip(
            model.named_buffers(), other.named_buffers(), strict=True
        ):
            assert torch.equal(buffer, theirs_too), name
        assert [p.requires_grad for p in model.parameters()] == [
            p.requires_grad for p in other.parameters()
        ]
        results.append(logits(model, kind))
        assert torch.equal(results[-1], logits(other, kind))
    assert not any(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_storage_is_shared_where_the_group_is(made: tuple[Path, str], dtype: Any) -> None:
    out, kind = made
    a, b, c, d = load(out, dtype=dtype).values()
    if dtype is not None:
        assert {p.dtype for p in a.parameters()} == {dtype}
    assert same(a, b, "att") == same(c, d, "att") == {True}
    assert same(b, c, "att") == {False}
    assert same(a, b, MLP[kind]) == same(a, c, MLP[kind]) == {True}
    assert same(a, d, MLP[kind]) == {False}
    assert same(a, b, KINDS[kind][1]) == {False}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_task(made: tuple[Path, str], dtype: Any) -> None:
    out, kind = made
    options = {} if dtype is None else {"dtype": dtype}
    model, other = load(out, "c", verify=True, **options), independent(out, "c", **options)
    for (name, value), (_, theirs) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert value.dtype == theirs.dtype
        assert torch.equal(value, theirs), name
    assert torch.equal(logits(model, kind), logits(other, kind))
    assert model.name_or_path == str(out / "c")


@pytest.mark.parametrize("made", ["bert", "tied llama", "mixtral"], indirect=True)
def test_device(made: tuple[Path, str], device: torch.device) -> None:
    out, kind = made
    for dtype in (None, torch.bfloat16):
        a, b, c, _ = load(out, device=device, dtype=dtype).values()
        assert {tensor.device.type for tensor in a.state_dict().values()} == {device.type}
        assert same(a, b, "att") == {True}
        assert same(b, c, "att") == {False}
        result = logits(a, kind).cpu()
        tolerance = 1e-3 if dtype is None else 5e-2
        expected = logits(independent(out, "a", **({"dtype": dtype} if dtype else {})), kind)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("made", ["bert", "tied llama", "mixtral"], indirect=True)
def test_what_is_moved_is_moved_once(made: tuple[Path, str]) -> None:
    """torch copies from "cpu" to "cpu:0", which stands for an accelerator here."""
    out, kind = made
    a, b, c, _ = load(out, device="cpu:0").values()
    assert same(a, b, "att") == same(a, c, MLP[kind]) == {True}
    assert same(b, c, "att") == {False}
    assert same(a, load(out, "a"), "att") == {False}
    for task, model in (("a", a), ("c", c)):
        assert torch.equal(logits(model, kind), logits(independent(out, task), kind))


@pytest.mark.parametrize("made", ["tied llama"], indirect=True)
def test_tied_weights_stay_tied(made: tuple[Path, str], device: torch.device) -> None:
    for dtype in (None, torch.bfloat16):
        for model in load(made[0], device=device, dtype=dtype).values():
            assert model.lm_head.weight is model.model.embed_tokens.weight


def test_masked_tasks_are_reconstructed(tmp_path: Path) -> None:
    base, paths = models(tmp_path, vit, TASKS)
    groups = [(["a"], "dense"), (["b", "c", "d"], "masked")]
    expected = write(tmp_path / "out", base, paths, lambda block: groups)
    for task, model in load(tmp_path / "out").items():
        # Saved and read again, to have the names of the files.
        model.save_pretrained(tmp_path / task)
        saved = independent(tmp_path, task).state_dict()
        ours = model.state_dict()
        assert all(torch.equal(ours[name], saved[name]) for name in saved)
        from safetensors.torch import load_file

        for name, value in load_file(tmp_path / task / "model.safetensors").items():
            torch.testing.assert_close(value, expected[task][name], rtol=1e-6, atol=1e-8)


def test_generation_settings_are_the_tasks_own(tmp_path: Path) -> None:
    base, paths = models(tmp_path, llama, TASKS)
    path = paths["b"] / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 7}))
    write(tmp_path / "out", base, paths, dense, "lm_head")
    loaded = load(tmp_path / "out")
    assert loaded["b"].generation_config.max_new_tokens == 7
    assert loaded["a"].generation_config.max_new_tokens is None


def test_heads_of_different_sizes(tmp_path: Path) -> None:
    base, paths = models(tmp_path, bert, TASKS)
    other = transformers.BertForSequenceClassification.from_pretrained(
        paths["d"], num_labels=5, ignore_mismatched_sizes=True
    )
    other.save_pretrained(paths["d"])
    write(tmp_path / "out", base, paths, dense)
    loaded = load(tmp_path / "out")
    assert loaded["a"].classifier.weight.shape == (3, 32)
    assert loaded["d"].classifier.weight.shape == (5, 32)
    assert logits(loaded["d"], "bert").shape == (1, 5)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    base, paths = models(folder, bert, TASKS)
    write(folder / "out", base, paths, dense)
    return folder / "out"


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return linked_copy(sound, tmp_path / "out")


def reconfigure(out: Path, **changes: Any) -> None:
    path = out / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Some versions of transformers refuse what is no list of names themselves.
CLASS = r"b/config\.json, architectures|'architectures'"
REFUSED = [
    ({"num_hidden_layers": 3}, r"b, bert\.encoder\.layer\.2\..*found no tensor"),
    ({"num_hidden_layers": 1}, "a tensor that the model has no place for"),
    (
        {"id2label": {str(i): str(i) for i in range(7)}},
        r"b, classifier\.weight: found shape \[3, 32\]; .*7",
    ),
    ({"hidden_size": [32]}, r"/b: .*'hidden_size'"),
    ({"model_type": "no such type"}, "no such type"),
    *(
        ({"architectures": named}, CLASS)
        for named in (
            None,
            True,
            [],
            [{}],
            ["BertModel", "ViTModel"],
            ["NoSuchModel"],
            ["pipeline"],
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_configurations_that_do_not_fit_are_refused(
    out: Path, changes: dict[str, Any], message: str
) -> None:
    """Parameters that are missing are not made up, for one."""
    reconfigure(out, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(out, "b")


def test_no_configuration(out: Path) -> None:
    (out / "b" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"b/config\.json: found no file"):
        load(out, "b")


def test_configuration_outside(out: Path) -> None:
    (out / "b" / "config.json").rename(out.parent / "config.json")
    (out / "b" / "config.json").symlink_to(out.parent / "config.json")
    with pytest.raises(CheckpointError, match=r"b/config\.json: found a link to"):
        load(out, "b")


def test_code_of_a_model_is_not_run_unasked(out: Path) -> None:
    marker = out.parent / "was run"
    (out / "b" / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertForSequenceClassification\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnModel(BertForSequenceClassification):\n    pass\n"
    )
    reconfigure(
        out,
        architectures=["OwnModel"],
        auto_map={"AutoModelForSequenceClassification": "modeling_own.OwnModel"},
    )
    with pytest.raises(CheckpointError, match="trust_remote_code=True if you trust it"):
        load(out, "b")
    assert not marker.exists()
    model = load(out, "b", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert marker.exists()


def test_nothing_is_loaded_from_a_broken_checkpoint(out: Path) -> None:
    with edited(out) as content:
        content["files"][0]["sha256"] = "0" * 64
    load(out, "a")
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(out, "a", verify=True)


MEASURE = """
import sys
import torch, transformers
from mergekit_ext.flexmerge import load
from transformers import BertConfig, BertForSequenceClassification

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))

inputs = {"input_ids": torch.arange(8)[None]}
# What the libraries load at the first use is no part of a model.
tiny = BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                  intermediate_size=16)
BertForSequenceClassification(tiny)(**inputs)
before = resident()
models = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
with torch.no_grad():
    for model in models.values():
        model(**inputs)
        sum(float(parameter.sum()) for parameter in model.parameters())
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize(("dtype", "models_held"), [("float32", 2.0), ("bfloat16", 1.0)])
def test_eight_models_take_the_memory_of_two(
    eight: tuple[Path, int], dtype: str, models_held: float
) -> None:
    out, one_model = eight
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(out), dtype],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Besides the weights: eight times the modules themselves, and freed memory that is kept.
    assert int(done.stdout) < (models_held + 1.0) * one_model
    assert int(done.stdout) > 0.9 * models_held * one_model


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Eight tasks at size 2, and the bytes of one model."""

    def make() -> transformers.PreTrainedModel:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=1000,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=8,
                num_attention_heads=4,
            )
        )

    folder = tmp_path_factory.mktemp("eight")
    tasks = [f"task{index}" for index in range(8)]
    base, paths = models(folder, make, tasks)
    groups = [(tasks[:4], "dense"), (tasks[4:], "dense")]
    write(folder / "out", base, paths, lambda block: groups)
    return folder / "out", (base / "model.safetensors").stat().st_size
