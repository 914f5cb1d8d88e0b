"""The names of `mergekit_ext` and `peft_merge`: what is shown, what it costs, how long help is."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mergekit_ext
import peft_merge
from tests.models import config, family, llama, tokenizer

TEXT = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
PACKAGES = {"mergekit_ext": mergekit_ext, "peft_merge": peft_merge}
FUNCTIONS = [
    pytest.param(getattr(package, name), id=f"{title}.{name}")
    for title, package in PACKAGES.items()
    for name in package.__all__
    if callable(getattr(package, name)) and not isinstance(getattr(package, name), type)
]


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_nothing_else_is_shown(package: Any) -> None:
    assert dir(package) == sorted(package.__all__)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_help_fits_a_screen(function: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(function))
    assert len(text.splitlines()) <= 40
    assert function.__name__ == "register" or ">>>" in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page works with, in the current directory."""
    base, tuned = family(tmp_path / "made", llama, amounts=(0.01, 0.02))
    for name, path in zip(("base", "code", "maths"), (base, *tuned), strict=True):
        path.rename(tmp_path / name)
        tokenizer(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ("lora-code", "lora-maths"):
        config_of = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config_of).save_pretrained(
            name
        )
    models = [Path("code"), Path("maths")]
    documents = {
        "merge": config("nan", models, Path("base")),
        "flex": config("flexmerge", models, Path("base"), {"target_size": 1.5}),
        "decompose": config("decompose", models, Path("base"), {"rank": 4}),
        "adapters": config("linear", [Path("lora-code"), Path("lora-maths")]),
    }
    for name, document in documents.items():
        Path(f"{name}.yml").write_text(yaml.safe_dump(document))
    return tmp_path


def test_the_page_runs(folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
