"""Serve every task of a FlexMerge checkpoint of text classifiers: POST /TASK {"text": "..."}.

CHECKPOINT=out uvicorn examples.serving.app:app
"""

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import torch
from fastapi import Body, FastAPI, HTTPException
from transformers import AutoTokenizer

from mergekit_ext import flexmerge

if "CHECKPOINT" not in os.environ:
    sys.exit("Set CHECKPOINT to the folder of a FlexMerge checkpoint.")
checkpoint = Path(os.environ["CHECKPOINT"])
models = flexmerge.load(checkpoint)
mixed = flexmerge.Batched(models)
tokenizers = {task: AutoTokenizer.from_pretrained(checkpoint / task) for task in models}
first = tokenizers[mixed.tasks[0]]  # pads the rows of all
for task, own in tokenizers.items():
    padding = ("pad_token_id", "padding_side", "model_input_names")
    if own.pad_token is None or any(getattr(own, n) != getattr(first, n) for n in padding):
        sys.exit(f"{task}: its tokenizer has no pad token, or pads in another way than others do.")
# RoBERTa and its like number positions from behind the padding's.
offset = getattr(getattr(mixed.model.base_model, "embeddings", None), "padding_idx", -1) + 1
positions = getattr(mixed.config, "max_position_embeddings", 512) - offset


def classify(tasks, texts):
    """Return the probability of each label, for each text by the model of its task."""
    rows = []
    for task, text in zip(tasks, texts, strict=True):
        own = tokenizers[task]
        longest = min(own.model_max_length, positions)
        rows.append(own(text, truncation=True, max_length=longest))
    with torch.inference_mode():
        logits = mixed(**first.pad(rows, return_tensors="pt"), tasks=tasks).logits
    if isinstance(logits, dict):  # heads of different shape
        left = {task: iter(own) for task, own in logits.items()}
        logits = [next(left[task]) for task in tasks]
    labels = [models[task].config.id2label.values() for task in tasks]
    return [dict(zip(own, row.softmax(-1).tolist())) for own, row in zip(labels, logits)]  # noqa: B905


def answered(batch):
    """Return the answers of a batch; a text that cannot be computed fails no other."""
    try:
        return classify(*map(list, zip(*batch, strict=True)))
    except Exception as error:
        return [error] if len(batch) == 1 else [answered([one])[0] for one in batch]


async def work(waiting):
    """Compute what has arrived during the batch before, whichever tasks it is for."""
    while True:
        batch = [await waiting.get()]
        batch += [waiting.get_nowait() for _ in range(min(waiting.qsize(), 31))]
        found = await asyncio.to_thread(answered, [given for given, _ in batch])
        for (_, answer), result in zip(batch, found, strict=True):
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
    await app.state.waiting.put(((task, text), answer))
    if isinstance(result := await answer.get(), Exception):
        raise HTTPException(500, str(result))
    return result
