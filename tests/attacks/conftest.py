"""Inputs that are made once, copies to spoil, and what must be true of every answer."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.attacks.readers import Outcome, Reader, copied, make_inputs

# A reader may take this much longer, and hold this much more.
_SECONDS = 20
_KIBIBYTES = 200_000
# A message is read by people.
_CHARACTERS = 6_000


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def inputs(sound: Path, tmp_path: Path) -> Path:
    return copied(sound, tmp_path / "inputs")


@pytest.fixture
def answer(tmp_path: Path) -> Callable[[Reader, Path], Outcome]:
    """Start a reader; it must not hang, fill the memory, or write anywhere but to its output."""

    def start(reader: Reader, inputs: Path) -> Outcome:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        before = _files(inputs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with _in_time():
            outcome = reader(inputs, work / "out")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert grown < _KIBIBYTES, f"{grown} KiB more memory"
        assert _files(inputs) == before, "the inputs changed"
        written = {path.name for path in work.iterdir() if path.suffix != ".yml"}
        assert written <= ({"out"} if outcome.code == 0 else set())
        return outcome

    return start


@pytest.fixture
def refused(answer: Callable[[Reader, Path], Outcome]) -> Callable[[Reader, Path], str]:
    """Start a reader that must refuse what it finds, with one readable error."""

    def start(reader: Reader, inputs: Path) -> str:
        outcome = answer(reader, inputs)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.text
        assert 0 < len(outcome.text) < _CHARACTERS
        assert "expected" in outcome.text
        assert all(char.isprintable() or char == "\n" for char in outcome.text), outcome.text
        return outcome.text

    return start


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
