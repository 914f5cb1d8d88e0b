"""Sections for the model card that mergekit writes, and `merge_report.json`."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from mergekit_ext.core.memory import in_models

CARD, REPORT_NAME = "README.md", "merge_report.json"
# What is said of each tensor or task.
_Records = Mapping[str, Mapping[str, Any]]
# By what follows "For" in the name of a class of transformers.
_PIPELINES = {
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "ImageClassification": "image-classification",
}


def model_card(kind: str, model: str, called: str, card: str = "", task: str = "") -> str:
    """Return a card with what the Hub reads of a model, and how to load it.

    `kind` and `model` are its classes in sentence-transformers and transformers, "" for none.
    `called` is its folder, and the title of a new card, which only a SentenceTransformer gets; of a
    FlexMerge a `task` lies in a folder below.
    """
    library, pipeline, tags = "transformers", _PIPELINES.get(model.rpartition("For")[2]), []
    below = f', subfolder="{task}"' if task else ""
    example = [f"from {library} import {model}", "", f'{model}.from_pretrained("{called}"{below})']
    if kind == "SentenceTransformer":
        library, pipeline = "sentence-transformers", "sentence-similarity"
        tags, path = [library, pipeline, "feature-extraction"], f"{called}/{task}".rstrip("/")
        example = [f"from sentence_transformers import {kind}", "", f'model = {kind}("{path}")']
        example.append('model.encode(["One text.", "Another one."])')
    elif not card:
        return ""
    _, header, text = (card or f"---\ntags: [merge]\n---\n# {called}\n").split("---\n", 2)
    found = {**yaml.safe_load(header), "library_name": library, "pipeline_tag": pipeline}
    found["tags"] = [*tags, *found["tags"], "mergekit-ext"]
    found["base_model_relation"] = "merge" if found.get("base_model") else None
    header = yaml.safe_dump({name: value for name, value in found.items() if value})
    use = ["", "### Use", "", "```python", *example, "```"] if kind or model.isidentifier() else []
    return "\n".join([f"---\n{header}---\n{text.rstrip()}", *use, ""])


def in_effect(shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]]) -> str:
    """Return the parameters of a merge on one line; of models that differ all values."""
    found = dict(shared)
    for name in dict.fromkeys(name for own in each for name in own):
        values = [own.get(name, shared.get(name)) for own in each]
        found[name] = values[0] if values.count(values[0]) == len(values) else values
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def method_section(parameters: str, paper: str) -> str:
    """Return the parameters in effect, and the BibTeX of a paper that papers.bib has."""
    parts = [f"### Parameters in effect\n\n{parameters}"] if parameters else []
    entries = Path(__file__).with_name("papers.bib").read_text(encoding="utf-8").split("\n\n")
    cited = (entry.strip() for entry in entries if paper and f"{{{paper}}}" in entry)
    return "\n\n".join([*parts, *(f"### Citation\n\n```bibtex\n{one}\n```" for one in cited)])


def write_report(folder: Path, method: str, tensors: _Records, seed: int, **more: Any) -> None:
    """Write the report of a merge into `folder`; `tensors` is what the method says of each."""
    content = {"format_version": 1, "method": method, "seed": seed, **more, "tensors": tensors}
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


def _short(models: Sequence[str]) -> list[str]:
    names = [Path(model).name or model for model in models]
    return names if len(set(names)) == len(names) else list(models)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def coefficients_section(tensors: _Records, kind: Callable[[str], str]) -> str:
    """Return NAN's coefficients: mean and range over the tensors of each kind of block."""
    # A kind has a row for each set of models that its slices take.
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for name, details in tensors.items():
        if values := details.get("coefficients"):
            whole = details["group"] == "model"
            groups.setdefault(("model" if whole else kind(name), *values), []).append(values)
    if not groups:
        return ""
    models = list(dict.fromkeys(model for _, *own in groups for model in own))
    scales = [details["scale"] for details in tensors.values() if "scale" in details]
    rows = [
        [label, *(_mean_of([v[model] for v in found]) if model in own else "" for model in models)]
        for (label, *own), found in groups.items()
    ]
    parts = ["### NAN coefficients", f"Global factor (`scale`): {_mean_of(scales)}."]
    return "\n\n".join([*parts, table(["blocks", *_short(models)], rows)])


def _mean_of(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{fmean(values):.4f}" + (f" ({low:.4f} to {high:.4f})" if high > low else "")


def solver_section(tensors: _Records) -> str:
    """Return how LoRE's solver ended: convergence, iterations, ranks and singular values."""
    solved = {name: d for name, d in tensors.items() if d.get("iterations")}
    if not solved:
        return ""
    iterations = sorted(d["iterations"] for d in solved.values())
    converged = sum(bool(d["converged"]) for d in solved.values())
    models = list(dict.fromkeys(model for d in solved.values() for model in d["ranks"]))
    rows = []
    for name, model in zip(_short(models), models, strict=True):
        ranks = sorted(d["ranks"][model] for d in solved.values() if model in d["ranks"])
        tops = [d["singular_values"].get(model, 0.0) for d in solved.values()]
        rows.append([name, _spread(ranks), range_of(tops)])
    text = (
        f"{converged} of {len(solved)} tensors converged, in {_spread(iterations)} iterations "
        f"(lowest / median / highest). Each tensor is in `{REPORT_NAME}`."
    )
    head = ["model", "rank (lowest / median / highest)", "largest singular value"]
    return "\n\n".join(["### LoRE solver", text, table(head, rows)])


def copies_section(names: Collection[str], copied: Mapping[str, str]) -> str:
    """Return which of the output's tensors are one model's: a row for each module.

    A module is the outermost one whose tensors in the output (`names`) are all copied from the
    model; modules that differ in the numbers of layers or experts alone have one row.
    """
    inside: dict[str, set[str | None]] = {}
    for name in names:
        for prefix in _prefixes(name):
            inside.setdefault(prefix, set()).add(copied.get(name))
    rows: dict[tuple[str, str], list[str]] = {}
    for name, giver in copied.items():
        module = next((p + "*" for p in _prefixes(name) if inside[p] == {giver}), name)
        rows.setdefault((re.sub(r"\d+", "#", module), giver), []).append(module)
    if not rows:
        return ""
    shorter = dict(zip(givers := list(dict.fromkeys(copied.values())), _short(givers), strict=True))
    found = ([f"`{_numbered(m)}`", str(len(m)), shorter[giver]] for (_, giver), m in rows.items())
    return "\n\n".join(["### Tensors of one model", table(["tensors", "number", "model"], found)])


def quantised_section(stored: Mapping[str, str]) -> str:
    """Return what each input that was dequantised is stored in."""
    rows = zip(_short([*stored]), stored.values(), strict=True)
    found = table(["model", "dequantised from"], rows)
    return f"### Quantised inputs\n\n{found}" if stored else ""


def _prefixes(name: str) -> list[str]:
    return [name[: dot.end()] for dot in re.finditer(r"\.", name)]


def _numbered(names: Sequence[str]) -> str:
    """Return one name for several that differ in numbers: lowest and highest of each."""
    numbers = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    ranges = (str(min(n)) if min(n) == max(n) else f"[{min(n)}-{max(n)}]" for n in numbers)
    return re.sub(r"\d+", lambda _: next(ranges), names[0])


def flexmerge_section(
    size: Mapping[str, float], tasks: Sequence[tuple[str, bool]], kinds: dict[str, tuple[int, int]]
) -> str:
    """Return size, tasks, and how many copies of each kind of block are stored.

    `size` has ``models``, ``bytes`` and ``private_bytes``; `tasks` their names, and whether each
    is an ordinary checkpoint; `kinds` how many blocks, and how many stored groups.
    """
    count = len(tasks)
    rows = [[kind, str(n), f"{groups / n:.2f} of {count}"] for kind, (n, groups) in kinds.items()]
    private = size["private_bytes"]
    apart = f", and {private:,.0f} bytes of what is not merged" if private else ""
    plain = [name for name, ordinary in tasks if ordinary]
    made = [name for name, ordinary in tasks if not ordinary]
    text = f"{count} tasks in the space of {in_models(size['models']):.10g} models{apart}"
    parts = ["### FlexMerge", f"{text}: {size['bytes']:,.0f} bytes in all."]
    if plain:
        parts.append(f"Ordinary checkpoints, one folder each: {', '.join(plain)}.")
    if made:
        parts.append(
            f"Stored as masks or residuals: {', '.join(made)}. Load these with "
            "`mergekit_ext.flexmerge.load(folder, task=...)`, or write an ordinary folder with "
            "`mergekit-ext export folder task out`. Masks with their base, factors of residuals, "
            "and tensors of one task come on top of the copies below."
        )
    return "\n\n".join([*parts, table(["blocks", "number", "mean copies"], rows)])


def residual_section(tasks: _Records) -> str:
    """Return what is kept of each task: its ``bytes``, ``ranks`` and relative ``error``."""
    rows = [
        [name, " / ".join(map(str, found["ranks"])), f"{found['bytes']:,}", f"{found['error']:.4f}"]
        for name, found in tasks.items()
    ]
    text = (
        "What each task adds to the base, and the Frobenius norm of what is lost of its difference "
        f"from the base, relative to that difference. Each tensor is in `{REPORT_NAME}`."
    )
    head = ["task", "rank (lowest / median / highest)", "bytes", "relative error"]
    return "\n\n".join(["### Residuals", text, table(head, rows)])


def _spread(values: Sequence[int]) -> str:
    return f"{values[0]} / {values[len(values) // 2]} / {values[-1]}"


def range_of(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"
