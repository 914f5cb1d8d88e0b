"""Three tasks for a sentence encoder, about the documentation of installed packages.

* ``package``: which package a docstring is from, its name taken out (5 classes);
* ``section``: which section of a docstring some words are from (4);
* ``order``: whether a sentence is as it was, backwards, or shuffled (3).
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from . import sources

PACKAGES = ("matplotlib", "scipy", "sklearn", "torch", "transformers")
_NAMES = re.compile(
    r"matplotlib|mpl|pyplot|plt|scipy|sklearn|scikit-learn|pytorch|torch|transformers|huggingface",
    re.IGNORECASE,
)
SECTIONS = ("Examples", "Notes", "Parameters", "Returns")
_HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)
ORDERS = ("backwards", "intact", "shuffled")
CLASSES = {"package": PACKAGES, "section": SECTIONS, "order": ORDERS}
TASKS = tuple(CLASSES)
SPLITS = ("train", "validation", "test")
LONGEST = 12  # words

Example = tuple[str, int]


@dataclass(frozen=True)
class Size:
    """How many modules of each package are read, and texts of each task in each split."""

    modules: int
    train: int
    validation: int
    test: int


FULL = Size(modules=120, train=900, validation=60, test=144)
QUICK = Size(modules=20, train=48, validation=12, test=12)


def write_tasks(path: Path, size: Size, seed: int) -> None:
    """Collect the texts of all tasks, divide them, and write them as JSON.

    Each text is in one split of its task, and classes are equally frequent.
    """
    rng = random.Random(seed)
    found: dict[str, dict[str, set[str]]] = {
        task: {name: set() for name in names} for task, names in CLASSES.items()
    }
    for package in PACKAGES:
        for tree in sources.trees(package, size.modules):
            for docstring in sources.docstrings(tree):
                _sort_in(found, package, docstring, rng)
    document = {task: _divided(classes, size, rng) for task, classes in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def read_tasks(path: Path) -> dict[str, dict[str, list[Example]]]:
    """By task and split: texts with the number of their class in `CLASSES`."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {
        task: {split: [(text, label) for text, label in rows] for split, rows in splits.items()}
        for task, splits in document.items()
    }


def _sort_in(
    found: dict[str, dict[str, set[str]]], package: str, docstring: str, rng: random.Random
) -> None:
    first, *parts = _HEADING.split(docstring)
    _keep(found["package"][package], _NAMES.sub("", first))
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        if heading in SECTIONS:
            _keep(found["section"][heading], _excerpt(body, rng))
    words = first.split(". ")[0].split()[:LONGEST]
    if len(words) >= 6:
        kind = rng.choice(ORDERS)
        if kind == "backwards":
            words.reverse()
        elif kind == "shuffled":
            rng.shuffle(words)
        _keep(found["order"][kind], " ".join(words))


def _excerpt(body: str, rng: random.Random) -> str:
    words = body.replace(">>>", "").split()
    start = rng.randrange(max(1, len(words) - LONGEST))
    return " ".join(words[start : start + LONGEST])


def _keep(texts: set[str], text: str) -> None:
    words = text.split()[:LONGEST]
    if len(words) >= 4:
        texts.add(" ".join(words))


def _divided(
    classes: dict[str, set[str]], size: Size, rng: random.Random
) -> dict[str, list[Example]]:
    several = set[str]().union(
        *(a & b for n, a in classes.items() for o, b in classes.items() if n < o)
    )
    shuffled = []
    for name in sorted(classes):
        texts = sorted(classes[name] - several)
        rng.shuffle(texts)
        shuffled.append(texts)
    each = min(len(texts) for texts in shuffled)
    rows = [(shuffled[label][i], label) for i in range(each) for label in range(len(shuffled))]
    test, validation = size.test, size.test + size.validation
    if len(rows) < 2 * validation:
        raise ValueError(f"only {len(rows)} texts with classes {', '.join(sorted(classes))}")
    return {
        "test": rows[:test],
        "validation": rows[test:validation],
        "train": rows[validation : validation + size.train],
    }
