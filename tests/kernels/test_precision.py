"""Products keep float32 where a process has chosen TF32, and its choice is as before afterwards."""

from __future__ import annotations

import threading

import pytest
import torch

from mergekit_ext.kernels.precision import full_precision
from mergekit_ext.kernels.svt import MatmulShrinker, Rule

new = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")
PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def tf32(monkeypatch):
    """As transformers' `enable_tf32` leaves a process."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")


def precisions():
    return [place.fp32_precision for place in PLACES]


@new
def test_a_process_may_have_chosen_tf32(tf32):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    MatmulShrinker().first(x, Rule(mu=0.5))
    assert precisions() == ["tf32", "tf32"]
    torch.backends.fp32_precision = "ieee"  # which is inherited again
    assert precisions() == ["ieee", "ieee"]


@new
def test_the_last_of_several_threads_puts_it_back(tf32):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with full_precision():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    with full_precision():
        other.start()
        assert inside.wait(10)
    assert precisions() == ["ieee", "ieee"]
    leave.set()
    other.join()
    assert precisions() == ["tf32", "tf32"]
