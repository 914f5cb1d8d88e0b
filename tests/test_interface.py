"""The names of `mergekit_ext` and `peft_merge`: what is shown, what it costs, how long help is."""

from __future__ import annotations

import gc
import pydoc
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import mergekit_ext
import peft_merge
from mergekit_ext.errors import ConfigError
from tests.host.test_merge_models import make
from tests.models import config, family, state, tokenizer

TEXT = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
QUIET = MergeOptions(quiet=True)
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters under the names of the page."""
    made = tmp_path_factory.mktemp("made")
    base, tuned = family(made / "family", partial(make, tied=False), amounts=(0.01, 0.02))
    for name, path in zip(("base", "code", "maths"), (base, *tuned), strict=True):
        path.rename(made / name)
        tokenizer(made / name, [f"w{i}" for i in range(16)])
    for name in ("lora-code", "lora-maths"):
        config_of = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = AutoModelForCausalLM.from_pretrained(made / "base")
        get_peft_model(model, config_of).save_pretrained(made / name)
    return made


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page works with, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        Path(path.name).symlink_to(path)
    models = [Path("code"), Path("maths")]
    documents = {
        "merge": config("nan", models, Path("base")),
        "linear": config("linear", models, parameters={"weight": 1}),
        "open": config("nan", models, Path("base"), {"scale": {"from": 0.1, "to": 2}}),
        "flex": config("flexmerge", models, Path("base"), {"target_size": 1.5}),
        "decompose": config("decompose", models, Path("base"), {"rank": 4}),
        "adapters": config("linear", [Path("lora-code"), Path("lora-maths")]),
        "open-adapters": config(
            "nan", [Path("lora-code")], parameters={"scale": {"from": 0.1, "to": 2}}
        ),
    }
    for name, document in documents.items():
        Path(f"{name}.yml").write_text(yaml.safe_dump(document))
    return tmp_path


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
def test_the_page_runs(folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize("form", ["path", "text", "mapping", "parsed"])
def test_a_configuration_in_every_form_gives_the_same(form: str, folder: Path) -> None:
    text = Path("merge.yml").read_text()
    config = {
        "path": Path("merge.yml"),
        "text": text,
        "mapping": yaml.safe_load(text) | {"base_model": Path("base")},
        "parsed": MergeConfiguration.model_validate(yaml.safe_load(text)),
    }[form]
    assert not mergekit_ext.check(config).problems
    result = mergekit_ext.merge(config, "out", QUIET)
    assert result.path == Path("out") and result.report["method"] == "nan"
    assert "NAN coefficients" in result.card
    expected = state(Path("out"))
    assert all(torch.equal(result.tensors[name], tensor) for name, tensor in expected.items())
    model = result.load()
    assert not model.training and type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


@pytest.mark.parametrize("name", ["linear", "decompose", "flex"])
def test_without_a_folder_nothing_is_left(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    result = mergekit_ext.merge(f"{name}.yml", options=QUIET)
    tensors = result.tensors
    assert result.report["method"]
    if name != "linear":
        assert set(tensors) == {"code", "maths"} | ({"base"} if name == "decompose" else set())
        tensors = tensors["code"]
    norms = {key: float(tensors[key].norm()) for key in tensors}
    assert len(norms) > 5 and any(scratch.iterdir())
    held = {key: tensors[key] for key in norms}
    del result, tensors
    gc.collect()
    assert not any(scratch.iterdir())
    assert {key: float(tensor.norm()) for key, tensor in held.items()} == norms
    with pytest.raises(ConfigError):
        mergekit_ext.merge({"merge_method": "nan", "models": [{"model": "none"}]})
    gc.collect()
    assert not any(scratch.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mergekit_ext.merge(3), "config: found int; expected a path, YAML text"),
        (lambda: mergekit_ext.check(["merge.yml"]), "config: found list"),
        (lambda: mergekit_ext.check({"models": {1, 2}}), "config: found dict"),
        (lambda: mergekit_ext.merge("no.yml"), "no.yml: found a file that cannot be read"),
        (lambda: mergekit_ext.decompose("merge.yml"), "merge_method: found 'nan'; expected"),
        (lambda: mergekit_ext.analyze("merge.yml"), "expected 'flexmerge' or 'decompose'"),
        (lambda: mergekit_ext.methods("loer"), "Write `lore`"),
        (lambda: peft_merge.check("no.yml"), "no.yml: found a file that cannot be read"),
        (lambda: peft_merge.merge_adapters(["code"], model=3), "model: found int; expected a Peft"),
    ],
)
def test_what_is_wrong_is_one_error(call: Any, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
