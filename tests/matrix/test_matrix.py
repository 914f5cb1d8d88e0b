"""A small form of the matrix of docs/models.md: one class or two of each kind.

All of it: ``python -m bench.matrix``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.classes import ROWS
from tests.matrix.family import Family
from tests.matrix.judge import COLUMNS, REFUSED, RIGHT, judge

SMALL = (
    "LlamaForCausalLM, biases",
    "GPT2LMHeadModel, untied",
    "MixtralForCausalLM",
    "Mamba2ForCausalLM",
    "BertForSequenceClassification",
    "BertModel",
    "RobertaModel",
    "T5ForConditionalGeneration, v1.0",
    "WhisperForConditionalGeneration",
    "ViTForImageClassification",
    "ResNetForImageClassification",
    "LlavaForConditionalGeneration",
)
# All columns are tested of these, of the others some: what a class has to do with is in each.
WHOLE = ("MixtralForCausalLM", "ResNetForImageClassification", "ViTForImageClassification")
PART = ("nan", "flexmerge", "base+adapter, nan")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def documented() -> dict[str, list[str]]:
    """The outcomes in the table, by class."""
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {name[2:]: [cell.split()[0] for cell in cells] for name, _, *cells in lines[1:]}


def test_the_table_is_that_of_the_classes():
    table = documented()
    assert [row.name for row in ROWS] == [name for name in table if name != "---"]
    assert len({row.name.split(",")[0] for row in ROWS}) >= 40
    for row in ROWS:
        assert {*table[row.name]} <= {RIGHT, REFUSED}, row.name


@pytest.mark.parametrize("name", SMALL)
def test_merges_are_right_or_refused(name, tmp_path):
    (row,) = (row for row in ROWS if row.name == name)
    family = Family(row, tmp_path)
    wanted = dict(zip(COLUMNS, documented()[name], strict=True))
    columns = COLUMNS if name in WHOLE else PART
    verdicts = {column: judge(family, column) for column in columns}
    found = {column: verdict.outcome for column, verdict in verdicts.items()}
    assert found == {column: wanted[column] for column in columns}, verdicts
