"""All scores of one family and one seed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.evidence import merging, tables
from bench.evidence.families import FAMILIES, TEST, VALIDATION, Family, Scores, State, make
from bench.evidence.rows import NORMS, Row, rows

Job = tuple[str, int, Path, bool]


def measure(job: Job) -> str:
    """Score all rows of a family and a seed that are not in its file yet."""
    name, seed, out, quick = job
    began, family, home = time.perf_counter(), FAMILIES[name], out / f"{name}{seed}"
    make(name, home, seed, quick)
    path = home.with_suffix(".jsonl")
    there = {line["row"] for line in tables.read(path)}
    inputs = [merging.member_of(family, home, member) for member in family.members]
    own = _individual(family, home, inputs)
    for title, row in rows(family.adapters).items():
        if title not in there:
            found = _row(family, home, row, inputs, own)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": title, **found}) + "\n")
    return f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s"


def _individual(family: Family, home: Path, inputs: Sequence[State]) -> Mapping[str, Scores]:
    """Return, by split and task, the accuracy of the task's own member."""
    found: dict[str, dict[str, float]] = {VALIDATION: {}, TEST: {}}
    for member, state in zip(family.members, inputs, strict=True):
        model = merging.loaded(family, home, state)
        for split, scores in found.items():
            of_member = family.scores(model, home, split)
            scores |= {task: of_member[task] for task, own in family.own.items() if own == member}
    return found


def _row(
    family: Family, home: Path, row: Row, inputs: Sequence[State], own: Mapping[str, Scores]
) -> dict[str, Any]:
    def score(state: State, split: str) -> float:
        scores = family.scores(merging.loaded(family, home, state), home, split)
        return fmean(scores[task] / best for task, best in own[split].items())

    found: dict[str, Any] = {}
    tried: list[tuple[float, dict[str, Any], State]] = []
    for variant in ({}, *row.variants):
        line = merging.line(family, home, row, variant, inputs)
        points = {1.0: line.rho(1.0)}
        if row.factor is not None:
            # Variants are tried at their own length, and at the norm that was best so far.
            norms = (max(tried, key=_score)[1]["rho"],) if variant else NORMS
            points |= {line.reaching(rho): rho for rho in norms}
        for t, rho in points.items():
            state = line.at(t)
            point = {**variant, "t": t, "rho": rho, "validation": score(state, VALIDATION)}
            tried.append((point["validation"], point, state))
        if not variant:
            found["default"] = {"rho": points[1.0], "test": score(line.at(1.0), TEST)}
    _, point, state = max(tried, key=_score)
    found["tuned"] = {**point, "test": score(state, TEST)}
    found["tried"] = [point for _, point, _ in tried]
    if row.auto and row.factor is not None:
        line = merging.line(family, home, row, {row.factor: "auto"}, inputs)
        found["auto"] = {"rho": line.rho(1.0), "test": score(line.at(1.0), TEST)}
    return found


def _score(tried: tuple[float, dict[str, Any], State]) -> float:
    return tried[0]
