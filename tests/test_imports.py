"""Which package may import which, that no imports run in a circle, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    *("core", "declared", "errors", "events", "io", "kernels", "late", "parallel", "report"),
    "search",
}
# What each package of mergekit_ext may import of it, besides itself.
ALLOWED = {
    "errors": set(),
    "core": {"errors"},
    "events": {"core", "errors"},
    "kernels": {"errors"},
    "declared": {"core", "errors", "kernels"},
    "io": {"core", "errors"},
    "parallel": {"core", "errors"},
    "report": {"core", "errors", "events", "kernels"},
    "search": {"core", "errors", "events", "io", "report"},
    "flexmerge": BELOW,
    "host": {*BELOW, "flexmerge"},
    "callbacks": {*BELOW, "flexmerge", "host"},
    "cli": {*BELOW, "flexmerge", "host", "callbacks"},
    "late": set(),
    "autoload": {"host", "late"},
    "__main__": {"cli", "core"},
    "__init__": {"autoload"},
}
# peft_merge sees nothing that knows mergekit, and nothing of processes.
OF_ADAPTERS = {*BELOW, "flexmerge"} - {"parallel"}
# The packages that may import another project, at all; peft_merge is one of ours.
KNOWN = {"mergekit": {"host", "cli"}, "peft_merge": {"host", "callbacks"}}
LIBRARIES = {"peft", "transformers"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST, *, late: bool = True):
    """Every module that is imported; with `late` also inside of functions, but not for types."""
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif late or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_arrows():
    for path in files("mergekit_ext"):
        owner = path.relative_to(ROOT / "mergekit_ext").parts[0].removesuffix(".py")
        for name in imported(parsed(path)):
            first, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if first == "mergekit_ext" and part:
                known = (ROOT / "mergekit_ext" / part).is_dir() or part in ALLOWED
                assert not known or part in {owner, *ALLOWED[owner]}, f"{path} imports {name}"
            assert owner in KNOWN.get(first, {owner}), f"{path} imports {name}"


def test_arrows_of_adapters():
    for path in files("peft_merge"):
        tree = parsed(path)
        for name in imported(tree):
            parts = name.split(".")
            assert parts[0] != "mergekit", f"{path} imports {name}"
            if parts[0] == "mergekit_ext" and len(parts) > 1:
                assert parts[1] in OF_ADAPTERS, f"{path} imports {name}"
        early = {name.split(".")[0] for name in imported(tree, late=False)} & LIBRARIES
        assert not early, f"{path} imports {early} when it is imported"


def test_mergekit_is_changed_by_autoload_alone():
    users = [path.name for path in files("mergekit_ext") if "import patches" in path.read_text()]
    assert users == ["autoload.py"]


def test_no_imports_run_in_a_circle():
    """Faces of packages aside, whose names are handed on to users."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ("mergekit_ext", "peft_merge")
        for path in files(package)
        if path.name != "__init__.py"
    }
    graph = {
        name: {found for found in imported(parsed(path)) if found in paths and found != name}
        for name, path in paths.items()
    }
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, {name: sorted(needs & graph.keys()) for name, needs in graph.items()}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("peft_merge", {"mergekit", "peft", "transformers"}),
        ("mergekit_ext.host.run, mergekit.merge", {"accelerate", "peft", "torch._dynamo"}),
        *(
            (f"mergekit_ext.cli.{name}", {"torch", "transformers"})
            for name in ("analyze", "check", "export", "merge", "methods", "sizes", "tune")
        ),
        ("mergekit_ext.kernels.lore", {"mergekit"}),
        ("mergekit_ext.report.tables", {"matplotlib"}),
        *(
            (name, {"torch", "mergekit", "transformers", "pydantic"})
            for name in (
                "mergekit_ext",
                "mergekit_ext.events",
                "mergekit_ext.autoload",
                "mergekit_ext.callbacks",
            )
        ),
    ],
)
def test_what_importing_does_not_load(module, heavy):
    code = f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
