"""Words about an extraction: merge_report.json, a card, a summary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mergekit_ext.core.memory import size
from mergekit_ext.errors import listing
from peft_merge.adapter import Adapter
from peft_merge.extraction.plan import Plan
from peft_merge.io.write import PROJECT, of_base, page, state_dict
from peft_merge.report import FORMAT_VERSION, short

# Ranks, squared singular values, and squared norms.
Found = Mapping[str, tuple[int, Tensor, float]]


def report(
    plan: Plan,
    options: Mapping[str, Any],
    found: Found,
    left: Mapping[str, float],
    adapter: Adapter,
) -> dict[str, Any]:
    """Return what was kept and what was not, as JSON values; `left` are squared norms."""
    rests = {
        n: max(whole - float(squares[:k].sum()), 0.0) for n, (k, squares, whole) in found.items()
    }
    whole = math.fsum(norm for _, _, norm in found.values())
    missing = math.fsum(left.values())
    ranks = [rank for rank, _, _ in found.values() if rank]
    stored = state_dict(adapter)
    return {
        "format_version": FORMAT_VERSION,
        "method": "extract",
        "base": plan.base.name,
        "model": plan.model.name,
        "rank": options["rank"],
        "energy": options["energy"],
        "vectors": options["vectors"],
        "summary": {
            "modules": len(adapter.infos),
            "smallest_rank": min(ranks, default=0),
            "largest_rank": max(ranks, default=0),
            "bytes": sum(tensor.nbytes for tensor in stored.values()),
            "dtype": short(next(iter(stored.values())).dtype),
            "error": math.sqrt(math.fsum(rests.values()) / whole) if whole else 0.0,
            "left": missing / (whole + missing) if missing else 0.0,
        },
        "modules": {
            n: {"rank": k, "norm": math.sqrt(norm), "error": math.sqrt(rests[n] / norm)}
            for n, (k, _, norm) in found.items()
        },
        "whole_tensors": sorted(adapter.saved),
        "reshaped": plan.reshaped,
        "left": {name: math.sqrt(square) for name, square in left.items()},
    }


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user should know of an extraction."""
    summary, left = report["summary"], report["left"]
    yield (
        f"{summary['modules']} modules, ranks {summary['smallest_rank']} to "
        f"{summary['largest_rank']}, {size(summary['bytes'])}. The relative error of the changes "
        f"of matrices is {summary['error']:.3g}."
    )
    if report["whole_tensors"]:
        yield f"Saved whole: {listing(report['whole_tensors'])}."
    if report["reshaped"]:
        yield (
            f"Before loading, give the base the shape of {listing(report['reshaped'])} "
            "(`resize_token_embeddings`, `num_labels`)."
        )
    if left:
        way = "" if report["vectors"] == "own" else " (`vectors: own` keeps what PEFT can)"
        yield (
            f"Left as in the base{way}: {listing(sorted(left))}, {summary['left']:.2%} of the "
            "squared norm of all changes."
        )


def card(adapter: Adapter, report: Mapping[str, Any]) -> str:
    """Return README.md."""
    metadata, tags, base = of_base(report["base"])
    return page(
        adapter.name,
        ["peft", "lora", "mergekit-ext", *tags],
        [
            f"A LoRA of {base}, extracted from its fine-tune `{report['model']}` with "
            f"`peft-merge extract` from {PROJECT}.",
            *sentences(report),
        ],
        [
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base_model, "{adapter.name}")',
        ],
        None,
        metadata,
    )
