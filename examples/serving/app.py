"""Serve every task of a FlexMerge checkpoint of text classifiers: POST /TASK {"text": "..."}.

CHECKPOINT=out uvicorn examples.serving.app:app
"""

import asyncio
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import torch
from fastapi import Body, FastAPI, HTTPException
from transformers import AutoTokenizer

from mergekit_ext import flexmerge

checkpoint = Path(os.environ["CHECKPOINT"])
models = flexmerge.load(checkpoint)
mixed = flexmerge.Batched(models)
tokenizer = AutoTokenizer.from_pretrained(checkpoint / mixed.tasks[0])
longest = mixed.config.max_position_embeddings


def classify(tasks, texts):
    """Return the probability of each label, for each text by the model of its task."""
    rows = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with torch.inference_mode():
        logits = mixed(**rows, tasks=tasks).logits
    if isinstance(logits, dict):  # heads of different shape
        left = {task: iter(own) for task, own in logits.items()}
        logits = [next(left[task]) for task in tasks]
    labels = [models[task].config.id2label.values() for task in tasks]
    return [dict(zip(own, row.softmax(-1).tolist())) for own, row in zip(labels, logits)]  # noqa: B905


async def work(waiting):
    """Compute what has arrived during the batch before, whichever tasks it is for."""
    while True:
        batch = [await waiting.get()]
        batch += [waiting.get_nowait() for _ in range(min(waiting.qsize(), 31))]
        tasks, texts, answers = map(list, zip(*batch, strict=True))
        try:
            found = await asyncio.to_thread(classify, tasks, texts)
        except Exception as error:
            found = [error] * len(batch)
        for answer, result in zip(answers, found, strict=True):
            answer.put_nowait(result)


@asynccontextmanager
async def lifespan(app):
    app.state.waiting = asyncio.Queue()
    worker = asyncio.create_task(work(app.state.waiting))
    yield
    worker.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/{task}")
async def post(task: str, text: Annotated[str, Body(embed=True)]) -> dict[str, float]:
    if task not in models:
        raise HTTPException(404, f"no task {task}: one of {', '.join(models)}")
    answer = asyncio.Queue(1)
    await app.state.waiting.put((task, text, answer))
    if isinstance(result := await answer.get(), Exception):
        raise HTTPException(500, str(result))
    return result
