"""What the documentation site has beyond docs/: pages of the repository, and the reference.

mkdocs.yml names this file under `hooks`. Links in pages are those of the repository. In the site, a
link to a page leads to its place there, and one to any other file is plain text.
"""

from __future__ import annotations

import logging
import os
import re
from importlib import import_module
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository, and their places in the site.
SHOWN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "bench/README.md": "bench.md",
    "examples/adapters/README.md": "examples/adapters.md",
    "examples/adapters/results.png": "examples/results.png",
    "examples/flexmerge/README.md": "examples/flexmerge.md",
    "examples/quickstart/README.md": "examples/quickstart.md",
    "examples/training/README.md": "examples/training.md",
}
PACKAGES = ("mergekit_ext", "mergekit_ext.flexmerge", "mergekit_ext.callbacks", "peft_merge")
# Code, or a link: its text and its target, without the anchor.
LINK = re.compile(
    r"^ *```.*?^ *```|`[^`]*`|\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)([^()\s]*)\)", re.M | re.S
)
logger = logging.getLogger("mkdocs.hooks")


def reference(package: str) -> str:
    """Return the page of the public names of a package; the site fills in their docstrings."""
    names = [f"{package}.{name}" for name in import_module(package).__all__ if name[0] != "_"]
    return "\n\n".join([f"# {package}", *(f"::: {name}" for name in names if name not in PACKAGES)])


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, place in SHOWN.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for package in PACKAGES:
        content = reference(package)
        files.append(File.generated(config, f"reference/{package}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Bring the links of a page from the repository's folders to the site's."""
    place = page.file.src_uri
    sources = {shown: source for source, shown in SHOWN.items()}
    folder = ROOT / Path(sources.get(place, f"docs/{place}")).parent

    def moved(found: re.Match[str]) -> str:
        text, target, anchor = found.groups()
        if target is None or ":" in target:
            return found[0]
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            logger.warning("%s: a link to %s, which does not exist", place, target)
            return text
        name = path.relative_to(ROOT).as_posix()
        to = SHOWN.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if to is None:
            return text
        return f"[{text}]({os.path.relpath(to, Path(place).parent)}{anchor})"

    return LINK.sub(moved, markdown)
