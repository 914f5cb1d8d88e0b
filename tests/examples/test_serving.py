"""The serving example: real requests for several tasks at once."""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import runpy
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import uvicorn

from mergekit_ext.flexmerge import load
from tests.flexmerge.handmade import models, write
from tests.flexmerge.test_runtime import TASKS, dense
from tests.models import bert, tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("serving")
    base, paths = models(folder, bert, TASKS)
    other = transformers.BertForSequenceClassification.from_pretrained(
        paths["d"], num_labels=5, ignore_mismatched_sizes=True
    )
    other.save_pretrained(paths["d"])
    for task, path in paths.items():
        words = [f"w{i}" for i in range(64)]
        tokenizer(path, words if task != "c" else words[:1] + words[:0:-1])
        made = transformers.AutoTokenizer.from_pretrained(path)
        made.pad_token = made.unk_token
        made.save_pretrained(path)
    write(folder / "out", base, paths, dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINT", str(folder / "out"))
        app = importlib.import_module("examples.serving.app").app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", folder / "out"
    server.should_exit = True
    thread.join()


def ask(url: str, content: dict[str, Any]) -> dict[str, float]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_each_request_is_answered_by_its_tasks_model(served: tuple[str, Path]) -> None:
    url, out = served
    texts = {task: f"w{number} w7" + " w9" * number for number, task in enumerate(TASKS, 3)}
    wanted = TASKS * 5
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(lambda t: ask(f"{url}/{t}", {"text": texts[t]}), wanted))
    for task, answer in zip(wanted, found, strict=True):
        words = transformers.AutoTokenizer.from_pretrained(out / task)
        model = load(out, task)
        with torch.no_grad():
            logits = model(**words(texts[task], return_tensors="pt")).logits[0]
        expected = dict(
            zip(model.config.id2label.values(), logits.softmax(-1).tolist(), strict=True)
        )
        assert answer == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "content", "code"),
    [("e", {"text": "w1"}, 404), ("a", {}, 422)],
)
def test_requests_that_cannot_be_answered(
    task: str, content: dict[str, Any], code: int, served: tuple[str, Path]
) -> None:
    with pytest.raises(urllib.error.HTTPError) as found:
        ask(f"{served[0]}/{task}", content)
    assert found.value.code == code
    assert ask(f"{served[0]}/a", {"text": "w1 " * 40})


def test_a_bad_text_fails_no_other_of_its_batch(served: tuple[str, Path]) -> None:
    app = importlib.import_module("examples.serving.app")
    good, bad = app.answered([("a", "w1 w2"), ("b", None)])
    assert sum(good.values()) == pytest.approx(1)
    assert isinstance(bad, Exception)


def test_a_cancelled_request_fails_no_other_of_its_batch(
    served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, go_on = importlib.import_module("examples.serving.app"), threading.Event()

    def classify(rows: list[Any]) -> list[dict[str, float]]:
        go_on.wait(30)
        return [{text: 1.0} for _, text in rows]

    async def answers() -> list[Any]:
        async with app.turn:  # so that the first computes the rows of all
            first, *others = (asyncio.create_task(app.post("a", text)) for text in "xyz")
            await asyncio.sleep(0.01)
        while app.waiting or not first.done():
            await asyncio.sleep(0.01)
            first.cancel()
        go_on.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    monkeypatch.setattr(app, "classify", classify)
    monkeypatch.setattr(app, "turn", asyncio.Lock())
    cancelled, *found = asyncio.run(answers())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert found == [{"y": 1.0}, {"z": 1.0}]


def started(patch: pytest.MonkeyPatch, checkpoint: Path | None) -> dict[str, Any]:
    """What the module holds that starts with this checkpoint."""
    patch.delenv("CHECKPOINT", raising=False)
    if checkpoint:
        patch.setenv("CHECKPOINT", str(checkpoint))
    return runpy.run_module("examples.serving.app")


def test_a_server_without_a_checkpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="Set CHECKPOINT"):
        started(monkeypatch, None)


def test_a_text_fills_the_positions_that_follow_the_paddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(
        vocab_size=64, intermediate_size=16, max_position_embeddings=12, **sizes
    )
    made_of = functools.partial(transformers.RobertaForSequenceClassification, config)
    base, paths = models(tmp_path, made_of, TASKS)
    for path in paths.values():
        tokenizer(path)
        made = transformers.AutoTokenizer.from_pretrained(path)
        made.pad_token = "w1"
        made.save_pretrained(path)
    write(tmp_path / "out", base, paths, dense)
    app = started(monkeypatch, tmp_path / "out")
    (answer,) = app["classify"]([("a", "w5 " * 40)])
    assert sum(answer.values()) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
def test_tokenizers_that_pad_in_other_ways_are_refused_at_the_start(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(served[1], tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(out / "b")
    made.pad_token = "w5"
    made.save_pretrained(out / "b")
    with pytest.raises(SystemExit, match="do not pad in the same way"):
        started(monkeypatch, out)
