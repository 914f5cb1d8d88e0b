"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mergekit_ext"
ANY = {
    "budget",
    "core",
    "dtypes",
    "errors",
    "events",
    "hooks",
    "interrupts",
    "io",
    "memory",
    "parallel",
    "methods",
    "scores",
    "kernels",
    "flexmerge",
    "host",
    "report",
    "callbacks",
    "cli",
    "autoload",
}
ALLOWED = {
    "core": {"core", "errors"},
    "budget": set(),
    "dtypes": set(),
    "errors": set(),
    "events": {"errors", "hooks"},
    "hooks": set(),
    "interrupts": set(),
    "io": {"io", "core", "dtypes", "errors"},
    "memory": {"budget", "errors"},
    "methods": {"methods", "core", "errors", "kernels", "memory"},
    "scores": {"errors"},
    "parallel": {"parallel", "errors"},
    "kernels": {"kernels", "errors"},
    "report": {"report", "kernels", "errors", "events"},
    "flexmerge": {
        "budget",
        "io",
        "core",
        "flexmerge",
        "parallel",
        "methods",
        "kernels",
        "errors",
        "events",
        "report",
    },
    "host": {
        "budget",
        "io",
        "core",
        "dtypes",
        "interrupts",
        "memory",
        "parallel",
        "scores",
        "flexmerge",
        "host",
        "methods",
        "kernels",
        "errors",
        "events",
        "report",
    },
    # host and peft_merge inside of functions: see tests/callbacks/test_protocol.py.
    "callbacks": {
        "callbacks",
        "io",
        "core",
        "dtypes",
        "errors",
        "events",
        "hooks",
        "scores",
        "kernels",
        "flexmerge",
        "host",
    },
    "cli": ANY,
    "__main__": {"cli"},
    "__init__": {"autoload", "host", "io", "memory"},
    "autoload": {"host"},
}
HOSTS = {"mergekit"}  # only host and cli may know it
# peft_merge knows of mergekit_ext only what knows nothing of mergekit.
ADAPTERS = PACKAGE.parent / "peft_merge"
SHARED = {
    "flexmerge",
    "io",
    "budget",
    "core",
    "dtypes",
    "kernels",
    "methods",
    "errors",
    "events",
    "interrupts",
    "memory",
    "report",
}
LIBRARIES = {"peft", "transformers"}  # loaded inside of functions


def modules(package=PACKAGE):
    return sorted(package.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            if node.module == "mergekit_ext":
                yield from (f"mergekit_ext.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} has no rule yet"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "mergekit_ext" and len(parts) > 1:
            assert parts[1] in ALLOWED[room], f"{path.name} imports {name}"
        if parts[0] in HOSTS:
            assert room in {"host", "cli"}, f"{path.name} imports {name}"
        if parts[0] == "peft_merge":
            assert room in {"host", "callbacks"}, f"{path.name} imports {name}"


def test_mergekit_is_changed_by_autoload_alone():
    users = [path.name for path in modules() if "import patches" in path.read_text()]
    assert users == ["autoload.py"]


@pytest.mark.parametrize("path", modules(ADAPTERS), ids=lambda p: str(p.relative_to(ADAPTERS)))
def test_arrows_of_peft_merge(path):
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in HOSTS, f"{path.name} imports {name}"
        if parts[0] == "mergekit_ext" and len(parts) > 1:
            assert parts[1] in SHARED, f"{path.name} imports {name}"


def top_level(path):
    """What a module imports when it is imported itself, outside of functions."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", modules(ADAPTERS), ids=lambda p: str(p.relative_to(ADAPTERS)))
def test_peft_merge_loads_libraries_late(path):
    early = {name.split(".")[0] for name in top_level(path)} & LIBRARIES
    assert not early, f"{path.name} imports {early} when it is imported"


def test_importing_peft_merge_loads_no_host_and_no_library():
    code = (
        "import sys, peft_merge; "
        "heavy = {'mergekit', 'peft', 'transformers'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    ["mergekit_ext", "mergekit_ext.events", "mergekit_ext.autoload", "mergekit_ext.callbacks"],
)
def test_light_imports_load_neither_torch_nor_mergekit(module):
    code = (
        f"import sys, {module}; "
        "heavy = {'torch', 'mergekit', 'transformers', 'pydantic'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_load_no_mergekit():
    code = (
        "import sys, mergekit_ext.kernels.nan, mergekit_ext.kernels.lore, "
        "mergekit_ext.kernels.task_arithmetic; sys.exit('mergekit' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
