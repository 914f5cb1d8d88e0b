"""What `methods` shows is declared, complete, in the docs, and runs.

`python -m tests.test_catalogue` writes the table of docs/methods.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit import merge_methods
from mergekit.options import MergeOptions

import mergekit_ext
import peft_merge
from mergekit_ext.core.parameters import Count, Share, choice, in_words
from mergekit_ext.declared.catalogue import default_of
from mergekit_ext.errors import ConfigError
from peft_merge.modules import rules
from tests.host.test_merge_models import make
from tests.models import command_here, family
from tests.peft_merge.models import KINDS, saved

PAGE = Path(__file__).parents[1] / "docs/methods.md"
CHOOSING = PAGE.with_name("choosing.md").read_text(encoding="utf-8")
CATALOGUES = {"models": mergekit_ext.methods(), "adapters": peft_merge.methods()}
YAML = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
MARKED = re.compile(r"(<!-- methods.* -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    rows = ["| method | when to use it | parameters |", "| --- | --- | --- |"]
    for name, found in CATALOGUES["models"].items():
        given = "; ".join(
            f"`{p.name}`{' (per model)' * p.per_model}: {in_words(p.kind)}, {default_of(p)}"
            for p in found.parameters
        )
        linked = f"[`{name}`]({found.paper})" if found.paper else f"`{name}`"
        rows.append(f"| {linked} | {found.use} | {given} |")
    return "\n".join(rows)


def current() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return MARKED.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", text)


def test_the_docs_are_not_stale() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert MARKED.search(text) and text == current(), "run python -m tests.test_catalogue"


def test_every_method_is_there() -> None:
    models, adapters = CATALOGUES.values()
    stock = {"MergeMethod", "mergekit"}
    for method in merge_methods.registered_methods():
        name = method.spec.name
        if type(method).__module__.split(".")[0] not in stock:
            assert name in models or name in models["nan_<method>"].use.split(": ")[1], name
    for name in rules():
        assert name in adapters or name in adapters["nan_<method>"].use, name


@pytest.mark.parametrize("kind", CATALOGUES)
def test_every_method_says_when_to_use_it(kind: str) -> None:
    for found in CATALOGUES[kind].values():
        assert (
            found.use.endswith(".") and found.title and all(p.description for p in found.parameters)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters under the names of the examples."""
    folder = tmp_path_factory.mktemp("models")
    tasks = ("code", "maths", "chat")
    base, tuned = family(folder / "made", make)
    for name, path in zip(("base", *tasks), (base, *tuned), strict=True):
        path.rename(folder / name)
    for step, task in zip((800, 900, 1000), tasks, strict=True):
        (folder / f"checkpoint-{step}").symlink_to(folder / task)
    (folder / "models").mkdir()
    for name, task in {"pretrained": "base", "digit": "code", "place": "maths"}.items():
        (folder / "models" / name).symlink_to(folder / task)
    for seed, task in enumerate(tasks):
        saved(KINDS["plain"], folder / f"lora-{task}", seed)
    return folder


CASES = [
    pytest.param(found.yaml, kind == "adapters", id=f"{kind}-{found.name}")
    for kind, catalogue in CATALOGUES.items()
    for found in catalogue.values()
]
CASES += [
    pytest.param(text, text.startswith("# adapters.yml"), id=f"choosing-{number}")
    for number, text in enumerate(YAML.findall(CHOOSING))
    if "from:" not in text
]
# The open values of `tune`.
OPEN = YAML.findall(CHOOSING + PAGE.with_name("tune.md").read_text(encoding="utf-8"))
OPEN = [text for text in OPEN if "from:" in text]


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize(("text", "adapters"), CASES)
def test_the_yaml_runs(
    text: str, adapters: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    if adapters:
        peft_merge.run_config(yaml.safe_load(text), out)
    else:
        mergekit_ext.merge(text, out, MergeOptions(quiet=True, copy_tokenizer=False))
    assert any(out.rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
@pytest.mark.parametrize("text", OPEN)
def test_every_method_of_an_open_file_can_be_tried(
    text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(folder)
    plain = MergeOptions(quiet=True, copy_tokenizer=False)

    def score(model: Any, task: str) -> float:
        return 1.0

    if "lora-" in text:
        base = KINDS["plain"].base
        peft_merge.tune(yaml.safe_load(text), tmp_path, score, base, trials=1, quiet=True)
    else:
        mergekit_ext.tune(text, tmp_path, score, plain, trials=1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Share | None, "number above 0 to 1"),
        (Count, "whole number from 1"),
        (choice("a", "b") | None, "a, b"),
        (bool, "true or false"),
        (str, "text"),
    ],
)
def test_types_in_words(kind: Any, words: str) -> None:
    assert in_words(kind) == words


@pytest.mark.parametrize("command", ["mergekit-ext", "peft-merge"])
def test_the_command_prints_what_the_function_returns(command: str) -> None:
    package: Any = mergekit_ext if command == "mergekit-ext" else peft_merge
    shown = command_here(command, "methods", "lore")
    assert shown.stdout == f"{package.methods('lore')}\n"
    assert "\nlore " in command_here(command, "methods").stdout
    refused = command_here(command, "methods", "loer")
    assert refused.returncode == 2 and "Write `lore`" in refused.stderr
    with pytest.raises(ConfigError, match="Write `lore`"):
        package.methods("loer")


@pytest.mark.parametrize("method", merge_methods.registered_methods(), ids=lambda m: m.spec.name)
def test_every_registered_method_has_a_page(method: Any) -> None:
    found = mergekit_ext.methods(method.spec.name)
    given = {p.name for p in method.spec.parameters}
    if method.spec.name not in CATALOGUES["models"]:
        assert {p.name for p in found.parameters} == given
        needed = {p.name for p in method.spec.parameters if p.required}
        assert {*yaml.safe_load(found.yaml)["parameters"]} == needed
    assert all(f"  {p.name} (" in str(found) for p in found.parameters)


def test_the_list_ends_with_methods_of_others() -> None:
    assert "Others that mergekit knows: arcee_fusion, " in str(CATALOGUES["models"])
    assert "Others" not in str(CATALOGUES["adapters"])


if __name__ == "__main__":
    PAGE.write_text(current(), encoding="utf-8")
