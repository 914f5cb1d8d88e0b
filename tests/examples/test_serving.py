"""The serving example: real requests for several tasks at once."""

from __future__ import annotations

import importlib
import json
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
    for path in paths.values():
        tokenizer(path)
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
    words = transformers.AutoTokenizer.from_pretrained(out / "a")
    for task, answer in zip(wanted, found, strict=True):
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
