"""The examples of other classes run from nothing, and what they write loads."""

from __future__ import annotations

import pytest

from examples.adapters.texts import QUICK
from examples.architectures.__main__ import KINDS, main


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps(kind, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("examples.architectures.embedding.SIZE", QUICK)
    scores = main([kind, "--quick", "--out", str(tmp_path)])
    first, *_, last = scores
    assert (first, last, len(scores)) == ("base", "merged", 4)
    assert (tmp_path / "merged" / "merge_report.json").exists()
