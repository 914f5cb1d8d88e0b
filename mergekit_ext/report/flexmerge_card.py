"""The section of the model card that says what the models of a FlexMerge share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ext.report.card import table


def flexmerge_section(
    size: Mapping[str, float],
    tasks: Sequence[tuple[str, bool]],
    kinds: Mapping[str, tuple[int, int]],
) -> str:
    """Size, tasks, and how many copies of each kind of block are stored.

    Args:
        size: ``models``, ``bytes`` and ``private_bytes``.
        tasks: names, and whether each folder is an ordinary checkpoint.
        kinds: for each kind of block how many blocks there are, and how many stored groups.
    """
    count = len(tasks)
    rows = [
        [kind, str(blocks), f"{groups / blocks:.2f} of {count}"]
        for kind, (blocks, groups) in kinds.items()
    ]
    private = size["private_bytes"]
    apart = f", and {private:,.0f} bytes that only one task each has" if private else ""
    plain = [name for name, ordinary in tasks if ordinary]
    masked = [name for name, ordinary in tasks if not ordinary]
    lines = [
        "### FlexMerge",
        "",
        f"{count} tasks in the space of {size['models']:.4g} models{apart}: "
        f"{size['bytes']:,.0f} bytes in all.",
        "",
    ]
    if plain:
        lines += [f"Ordinary checkpoints, one folder each: {', '.join(plain)}.", ""]
    if masked:
        lines += [
            f"Stored as masks: {', '.join(masked)}. Load these with "
            "`mergekit_ext.flexmerge.load(folder, task=...)`, or write an ordinary folder with "
            "`mergekit-ext export folder task out`. The base and the masks come on top of the "
            "copies below.",
            "",
        ]
    lines.append(table(["blocks", "number", "mean copies"], rows))
    return "\n".join(lines)
