"""Batches with rows of several adapters: each row is what its own adapter's folder computes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import transformers

import peft_merge
from tests.peft_merge.flexmerge.test_tasks import ALONE, TASKS, inputs, together, written
from tests.peft_merge.models import KINDS, base, gpt2, llama, reloaded, saved

DOCS = Path(__file__).resolve().parents[3] / "docs"
# Kinds that have no batches of several tasks.
REFUSED = {kind for kind in KINDS if not KINDS[kind].lora or "parameter" in kind} | {"attention"}
PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 5, 9], [3, 31, 4, 8], [0, 1, 11, 2], [1, 5, 9, 30]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
}
ROWS = ["t2", "t0", "t1", "t0"]


def logits(model, given, **names):
    found = model(**given, **names)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - ALONE))
def test_each_row_is_its_own_adapters(kind, tmp_path):
    written(inputs(kind, tmp_path), tmp_path / "out", 2)
    model, given = together(kind, tmp_path / "out"), KINDS[kind].inputs()
    with torch.no_grad():
        if kind in REFUSED:
            with pytest.raises((TypeError, ValueError), match=r"mixed|no batches of several tasks"):
                model(**given, adapter_names=TASKS[1:])
            return
        found = logits(model, given, adapter_names=TASKS[1:])
        for row, task in enumerate(TASKS[1:]):
            expected = logits(reloaded(KINDS[kind], tmp_path / "out" / task), given)[row]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("kind", ["plain", "conv1d_transformers"])
def test_each_row_is_generated_by_its_own_adapter(kind, settings, tmp_path):
    assert KINDS[kind].base in (llama, gpt2)
    written(inputs(kind, tmp_path), tmp_path / "out", 2)
    settings = {**settings, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    found = together(kind, tmp_path / "out").generate(**PROMPTS, adapter_names=ROWS, **settings)
    for task in TASKS:
        alone = reloaded(KINDS[kind], tmp_path / "out" / task)
        own = [row for row, name in enumerate(ROWS) if name == task]
        expected = alone.generate(**{k: v[own] for k, v in PROMPTS.items()}, **settings)
        assert torch.equal(found[own], expected)


def of_saved(tmp_path, modules):
    """Folders of LoRAs, of which only the first saves `modules`."""
    own = saved(KINDS["plain"], tmp_path / "t0", 1, modules_to_save=modules)
    return [own, saved(KINDS["plain"], tmp_path / "t1", 2)]


def test_rows_of_adapters_of_which_one_has_a_saved_module(tmp_path):
    written(of_saved(tmp_path, ["lm_head", "embed_tokens"]), tmp_path / "out", 2)
    model, given = together("plain", tmp_path / "out"), KINDS["plain"].inputs()
    names = ["t1", "t0"]
    with torch.no_grad():
        found = logits(model, given, adapter_names=names)
        for row, task in enumerate(names):
            alone = logits(reloaded(KINDS["plain"], tmp_path / "out" / task), given)
            torch.testing.assert_close(found[row], alone[row], rtol=1e-4, atol=1e-4)
            model.set_adapter(task)
            torch.testing.assert_close(logits(model, given), alone, rtol=1e-4, atol=1e-4)


def test_the_pages_remedy_for_saved_modules_of_one_adapter(tmp_path):
    """PEFT alone looks for a module of every adapter of the batch."""
    own, other = of_saved(tmp_path, ["lm_head"])
    model = peft.PeftModel.from_pretrained(base(KINDS["plain"]), own, adapter_name="t0")
    model.load_adapter(other, adapter_name="t1")
    given, names = KINDS["plain"].inputs(), ["t1", "t0"]
    with torch.no_grad():
        with pytest.raises(KeyError, match="t1"):
            model.eval()(**given, adapter_names=names)
        exec(block_with("update"), {"model": model})
        found = logits(model, given, adapter_names=names)
        for row, folder in enumerate((other, own)):
            alone = logits(reloaded(KINDS["plain"], folder), given)[row]
            torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)


def block_with(name):
    """The block of code of the page about batches in which `name` is called."""
    text = (DOCS / "batches.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```python\n((?:(?!```).)*{name}\(.*?)```", text, re.DOTALL)
    return textwrap.dedent(block)


def test_the_pages_example(tmp_path, monkeypatch):
    written(inputs("plain", tmp_path), tmp_path / "tasks", 2)
    base(KINDS["plain"]).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {"prompts": PROMPTS, "transformers": transformers, "peft_merge": peft_merge}
    exec(block_with("load_tasks"), names)
    assert names["made"].shape == (4, 6)
