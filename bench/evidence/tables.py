"""Tables of the scores that the study has written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.evidence.families import FAMILIES
from bench.evidence.rows import AVERAGE, NORMS, rows

SETTINGS = ("default", "auto", "tuned")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of scores; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tables(out: Path, families: Sequence[str], seeds: Sequence[int]) -> str:
    """Return a Markdown table for each family, of losses against the average, and of norms."""
    found = {
        family: [
            {line["row"]: line for line in read(out / f"{family}{seed}.jsonl")} for seed in seeds
        ]
        for family in families
    }
    parts = [_family(family, runs) for family, runs in found.items()]
    return "\n\n".join([_summary(found), _against_average(found), _norms(found), *parts])


def _summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Means over seeds as published; in brackets with the factor auto."""
    lines = ["| method | " + " | ".join(found) + " |", "| --- |" + " --: |" * len(found)]
    for title in dict.fromkeys(t for f in found for t in rows(FAMILIES[f].adapters)):
        cells = []
        for runs in found.values():
            some = [run[title] for run in runs if title in run]
            scores = ([r[key]["test"] for r in some if key in r] for key in ("default", "auto"))
            means = [f"{fmean(each):.3f}" for each in scores if each]
            cells.append(" (".join(means) + (")" if len(means) > 1 else ""))
        lines.append(f"| `{title}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _family(family: str, runs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"**{family}**",
        "",
        "| method | as published | rho | auto | rho | tuned | at |",
        "| --- | --: | --: | --: | --: | --: | --- |",
    ]
    for title in rows(FAMILIES[family].adapters):
        some = [run[title] for run in runs if title in run]
        cells = []
        for setting in SETTINGS:
            points = [line[setting] for line in some if setting in line]
            scores = [point["test"] for point in points]
            spread = (
                f"{fmean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})" if scores else ""
            )
            rho = f"{fmean(point['rho'] for point in points):.2f}" if points else ""
            cells += [spread] if setting == "tuned" else [spread, rho]
        hidden = ("t", "validation", "test")
        chosen = [
            " ".join(f"{k} {v:.2g}" for k, v in line["tuned"].items() if k not in hidden)
            for line in some
        ]
        lines.append(f"| `{title}` | {' | '.join(cells)} | {'; '.join(chosen)} |")
    return "\n".join(lines)


def _against_average(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """In how many families the mean score is below that of the plain average, by 0.005 or more."""
    lines = [
        "| method | as published below the average | auto below the average |",
        "| --- | --- | --- |",
    ]
    titles = dict.fromkeys(t for f in found for t in rows(FAMILIES[f].adapters))
    for title in titles:
        cells = []
        for setting in ("default", "auto"):
            losses, count = [], 0
            for family, runs in found.items():
                some = [
                    run[title][setting]["test"] for run in runs if setting in run.get(title, {})
                ]
                plain = [run[AVERAGE]["default"]["test"] for run in runs if AVERAGE in run]
                if some and plain:
                    count += 1
                    if fmean(some) < fmean(plain) - 0.005:
                        losses.append(f"{family} {fmean(some) - fmean(plain):+.3f}")
            cells.append(f"{len(losses)} of {count}: {', '.join(losses)}" if count else "")
        lines.append(f"| `{title}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _norms(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Validation at each norm, of variants that are the default: means over families and seeds."""
    lines = [
        "| method | " + " | ".join(f"rho {rho:g}" for rho in NORMS) + " |",
        "| --- |" + " --: |" * len(NORMS),
    ]
    titles = dict.fromkeys(t for f in found for t in rows(FAMILIES[f].adapters))
    for title in titles:
        by_rho: dict[float, list[float]] = {rho: [] for rho in NORMS}
        for runs in found.values():
            for run in runs:
                for point in run.get(title, {}).get("tried", ()):
                    plain = set(point) <= {"t", "rho", "validation"}
                    if plain and point["rho"] in by_rho and point["t"] != 1.0:
                        by_rho[point["rho"]].append(point["validation"])
        if any(by_rho.values()):
            cells = [f"{fmean(values):.3f}" if values else "" for values in by_rho.values()]
            lines.append(f"| `{title}` | {' | '.join(cells)} |")
    return "\n".join(lines)
