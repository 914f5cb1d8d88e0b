"""The example of fp8 checkpoints, with few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.quantised.__main__ import main


def test_merges_of_fp8_and_of_what_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--steps", "6"]) == 0
    shown = capsys.readouterr().out.splitlines()
    losses = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in shown[1:-1]}
    assert len(losses) == 8
    for name in ("one", "two", "merged"):
        assert losses[f"fp8/{name}"] == pytest.approx(losses[f"bf16/{name}"], abs=0.1)
    assert "differ by" in shown[-1]
    assert any(
        "float8" in str(t.dtype) for t in load_file(tmp_path / "fp8/one/model.safetensors").values()
    )
    merged = tmp_path / "fp8" / "merged"
    assert {str(t.dtype) for t in load_file(merged / "model.safetensors").values()} == {
        "torch.bfloat16"
    }
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
