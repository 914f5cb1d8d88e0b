"""The merges of `caps`, which pytest must know without what they import."""

NAMES = (
    "nan",
    "nan_ties",
    "lore",
    "tsv_m",
    "pcb",
    "emr",
    "flexmerge ties",
    "flexmerge emr",
    "peft linear",
    "peft ties",
)
