"""Pieces in threads of our own."""

from __future__ import annotations

import pytest
import torch

from mergekit_ext.kernels.threads import in_threads, in_turn

CPU = torch.device("cpu")


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_of_pieces_do_not_wait_for_themselves(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = in_threads(
            lambda i: sum(in_threads(lambda j: i * j, range(4), CPU)), range(20), CPU
        )
    finally:
        torch.set_num_threads(before)
    assert found == [6 * i for i in range(20)]


def test_results_come_in_order_and_an_error_in_its_turn():
    def work(piece):
        if piece == 3:
            raise ValueError("three")
        return piece

    results = in_turn(work, range(100), CPU)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
