"""The user's scores of a model: asked for, checked, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from mergekit_ext.flexmerge.runtime import build_module
from mergekit_ext.scores import CheckedScores, EvaluationError

# From a module and the name of its task to its scores.
Evaluate = Callable[[Any, str], Mapping[str, float] | float]


class Evaluator:
    """Calls the user's function with one model after the other.

    Args:
        function: scores a module; the higher, the better. It gets a transformers module in
            evaluation mode, on the CPU, whose weights it must not write to (it may move the
            module), and the name of its task. It returns a number, or a mapping from metrics to
            numbers, for a task always with the same metrics.
        quiet: without a progress bar.
        trust_remote_code: as for transformers.
    """

    def __init__(self, function: Evaluate, *, quiet: bool, trust_remote_code: bool = False):
        self._function, self._quiet = function, quiet
        self._trust_remote_code = trust_remote_code
        self._scores = CheckedScores()
        self._bar: Any = None

    @contextmanager
    def counting(self, description: str, total: int) -> Iterator[None]:
        """Show a bar of so many evaluations."""
        # Loading a model is fast and happens for each evaluation: its bars would hide this one.
        shown_before = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        self._bar = tqdm(total=total, desc=description, unit="model", disable=self._quiet)
        try:
            yield
        finally:
            self._bar.close()
            if shown_before:
                transformers.utils.logging.enable_progress_bar()

    def skip(self, count: int) -> None:
        """Count evaluations that are not needed."""
        self._bar.update(count)

    def score(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        task: str,
        what: str,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """The scores of one model.

        Args:
            folder: where its ``config.json`` is.
            tensors: all of its tensors.
            task: the name of its task.
            what: the model, as errors call it.
            dtype: that of its parameters, if it is not what its configuration says.

        Raises:
            EvaluationError: the function raised, returned something else than finite numbers, or
                other metrics than before.
        """
        module = build_module(
            folder, dict(tensors), dtype, trust_remote_code=self._trust_remote_code
        )
        try:
            returned = self._function(module, task)
        except Exception as error:
            raise EvaluationError.raised(error, what) from error
        found = self._scores.of(returned, task, what)
        self._bar.update()
        return found
