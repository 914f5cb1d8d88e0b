"""The work of the example, one job for each adapter and each merge, several at a time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from . import merging
from .report import Row
from .studies import STUDIES, mean

# What the short form merges.
QUICK_CONFIGS = ("linear", "linear_log")

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Job:
    """Something to do for one study: `subject` is an adapter, a configuration, a call of PEFT."""

    out: Path
    quick: bool
    seed: int
    study: str
    subject: str = ""


def run(each: Map, out: Path, quick: bool, seed: int) -> list[Row]:
    """Train everything, merge everything; rows in the order of the tables."""

    def job(study: str, subject: str = "") -> Job:
        return Job(out, quick, seed, study, subject)

    # Both encoder studies read the same texts.
    for line in each(_prepare, [job("language_lora"), job("encoder_lora")]):
        print(line, flush=True)
    members = [job(name, member) for name, study in STUDIES.items() for member in study.members]
    for line in each(_train, members):
        print(line, flush=True)
    merges = [
        job(study, config)
        for study in STUDIES
        for config in merging.available(study)
        if not quick or config in QUICK_CONFIGS
    ]
    calls = [
        job(study, call)
        for study, known in merging.PEFT_CALLS.items()
        for call in list(known)[: 1 if quick else None]
    ]
    rows = [
        *each(_inputs, [job(name) for name in STUDIES]),
        *each(_merge, merges),
        *each(_peft, calls),
    ]
    return [row for some in rows for row in some]


def _prepare(job: Job) -> str:
    began = time.perf_counter()
    STUDIES[job.study].prepare(job.out, job.quick, job.seed)
    return f"prepared {job.study} ({time.perf_counter() - began:.1f} s)"


def _train(job: Job) -> str:
    began = time.perf_counter()
    study = STUDIES[job.study]
    seed = job.seed + 1 + study.members.index(job.subject)
    study.train(job.out, job.subject, job.quick, seed)
    return f"trained {job.study}/{job.subject} ({time.perf_counter() - began:.1f} s)"


def _inputs(job: Job) -> list[Row]:
    """The base, and every adapter on what it was trained for."""
    study = STUDIES[job.study]
    base = study.scores(study.base(job.out), job.out, study.members, job.quick)
    own: dict[str, float] = {}
    for member in study.members:
        model = merging.loaded(study.base(job.out), job.out / job.study / member)
        own |= study.scores(model, job.out, [member], job.quick)
    return [_row(job, "base", "base", base), _row(job, "individual adapters", "individual", own)]


def _merge(job: Job) -> list[Row]:
    study = STUDIES[job.study]
    folder, seconds = merging.by_command(job.out, job.study, job.subject)
    model = merging.loaded(study.base(job.out), folder)
    scores = study.scores(model, job.out, study.members, job.quick)
    return [_row(job, job.subject, "merged", scores, seconds)]


def _peft(job: Job) -> list[Row]:
    study = STUDIES[job.study]
    folders = {member: job.out / job.study / member for member in study.members}
    call = merging.PEFT_CALLS[job.study][job.subject]
    model, seconds = merging.by_peft(study.base(job.out), folders, call)
    scores = study.scores(model, job.out, study.members, job.quick)
    return [_row(job, job.subject, "peft", scores, seconds)]


def _row(
    job: Job, name: str, kind: str, scores: dict[str, float], seconds: float | None = None
) -> Row:
    return Row(job.study, name, kind, scores, mean(STUDIES[job.study], scores), seconds)


@contextmanager
def pool(processes: int) -> Iterator[Map]:
    """``map``, in so many processes: tensors as small as these gain little from more threads."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=be_modest) as workers:
        yield workers.map


def be_modest() -> None:
    """One thread, and no progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
