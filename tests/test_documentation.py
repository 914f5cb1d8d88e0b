"""Code blocks of the documentation: names, arguments, parameters and options that exist.

Nothing runs here. The blocks of docs/python.md run in test_interface.py, others where their subject
is tested.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml

import mergekit_ext
import peft_merge
from mergekit_ext.cli import main as mergekit_ext_command
from mergekit_ext.errors import ConfigError
from peft_merge.cli import main as peft_merge_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/*/README.md")]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PACKAGES = {"mergekit_ext": mergekit_ext, "peft_merge": peft_merge}
COMMANDS = {"mergekit-ext": mergekit_ext_command, "peft-merge": peft_merge_command}


def blocks(*languages: str) -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found[2] in languages:
                line = text.count("\n", 0, found.start()) + 1
                name = page.relative_to(ROOT).as_posix()
                yield pytest.param(name, dedent(found[3]), id=f"{name}:{line}")


def imported(tree: ast.AST) -> dict[str, Any]:
    """The names that a block takes from the packages; the packages themselves need no import."""
    names: dict[str, Any] = dict(PACKAGES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            module = import_module(node.module or "")
            names |= {
                alias.asname or alias.name: getattr(module, alias.name) for alias in node.names
            }
    return names


def resolved(node: ast.AST, names: dict[str, Any]) -> Any:
    """What `node` is of the packages, or None; a name that they do not have raises."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, names)
        return getattr(owner, node.attr) if inspect.ismodule(owner) else None
    return None


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(page: str, text: str) -> None:
    tree = ast.parse(text)
    names = imported(tree)
    for node in ast.walk(tree):
        function = resolved(node.func if isinstance(node, ast.Call) else node, names)
        if isinstance(node, ast.Call) and function is not None:
            keywords = {word.arg: None for word in node.keywords if word.arg is not None}
            inspect.signature(function).bind_partial(*node.args, **keywords)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml(page: str, text: str) -> None:
    document = yaml.safe_load(text)
    assert isinstance(document, dict)
    if "merge_method" not in document or "from:" in text:  # a part of a file; open values of `tune`
        return
    of_adapters = page.startswith("docs/adapters") and "+" not in str(document["models"])
    of_adapters |= text.startswith("# adapters.yml")
    try:
        found = (peft_merge if of_adapters else mergekit_ext).check(document)
        problems = getattr(found, "problems", ())
    except ConfigError as error:
        problems = error.problems
    # The models of the block do not exist here.
    missing = ("models", "base_model", *(model["model"] for model in document["models"]))
    where = [problem.where for problem in problems]
    assert [w for w in where if "parameters" in w or not w.startswith(missing)] == [], problems


def commands() -> Iterator[Any]:
    for parameter in blocks("sh"):
        page, text = parameter.values
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in COMMANDS:
                yield pytest.param(words, id=f"{page}: {line.split('#')[0].strip()}")


@pytest.mark.parametrize("words", commands())
def test_commands(words: list[str]) -> None:
    group: Any = COMMANDS[words[0]]
    command = group.get_command(None, words[1]) or group.get_command(None, "merge")
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
