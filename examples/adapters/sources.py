"""Text that is on every machine with this project: the source of the packages it is installed with.

Nothing is imported or downloaded; files are found and read.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LARGEST = 150_000  # bytes; larger files are tables
_SKIPPED = {"site-packages", "test", "tests"}


def package_folder(name: str) -> Path:
    """Where an installed package lies.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def spread(folder: Path, pattern: str, count: int) -> list[Path]:
    """At most `count` files below `folder`, evenly spaced in the order of their names."""
    files = sorted(
        path
        for path in folder.rglob(pattern)
        if not _SKIPPED.intersection(path.relative_to(folder).parts)
        and 200 < path.stat().st_size < LARGEST
    )
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def trees(package: str, count: int) -> Iterator[ast.Module]:
    """Syntax trees of at most `count` modules of a package."""
    for path in spread(package_folder(package), "*.py", count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                yield ast.parse(text(path))
            except (SyntaxError, ValueError):
                continue


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Of the module and everything in it that has one."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node)
            if found:
                yield found
