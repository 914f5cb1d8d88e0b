"""matplotlib is there when it is needed, and only then."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mergekit_ext.report import plotting


def test_a_figure_without_a_window() -> None:
    pytest.importorskip("matplotlib")
    picture = plotting.figure(3.0, 2.0)
    assert tuple(picture.get_size_inches()) == (3.0, 2.0)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mergekit-ext\[plots\]"):
        plotting.figure(1.0, 1.0)


def test_nothing_loads_it_before_a_plot() -> None:
    modules = "plotting, curve, similarity"
    code = (
        f"from mergekit_ext.report import {modules}; import sys; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
