"""Serve every task of a FlexMerge checkpoint of text classifiers: POST /TASK {"text": "..."}.

CHECKPOINT=out uvicorn examples.serving.app:app
"""

import asyncio
import os
import sys
from typing import Annotated

import torch
from fastapi import Body, FastAPI, HTTPException
from transformers import AutoTokenizer

from mergekit_ext import flexmerge

out = os.environ.get("CHECKPOINT") or sys.exit("Set CHECKPOINT to a FlexMerge checkpoint's folder.")
models = flexmerge.load(out)
mixed = flexmerge.Batched(models)
tokenizers = {task: AutoTokenizer.from_pretrained(f"{out}/{task}") for task in models}
ways = {(own.pad_token_id, own.padding_side, *own.model_input_names) for own in tokenizers.values()}
if len(ways) > 1 or None in ways.pop():
    sys.exit("The tasks' tokenizers have no pad token, or do not pad in the same way.")
# RoBERTa and its like number positions from behind the padding's.
offset = getattr(getattr(mixed.model.base_model, "embeddings", None), "padding_idx", -1) + 1
positions = getattr(mixed.config, "max_position_embeddings", 512) - offset
for tokenizer in tokenizers.values():
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
app, waiting, turn = FastAPI(), [], asyncio.Lock()


def classify(rows):
    """Return the probability of each label, for each text by the model of its task."""
    tasks = [task for task, _ in rows]
    tokens = [tokenizers[task](text, truncation=True) for task, text in rows]
    with torch.inference_mode():
        logits = mixed(**tokenizer.pad(tokens, return_tensors="pt"), tasks=tasks).logits
    if isinstance(logits, dict):  # heads of different shape
        left = {task: iter(own) for task, own in logits.items()}
        logits = [next(left[task]) for task in tasks]
    labels = [models[task].config.id2label.values() for task in tasks]
    return [dict(zip(own, row.softmax(-1).tolist())) for own, row in zip(labels, logits)]  # noqa: B905


def answered(rows):
    """Return what `classify` does; a text that cannot be computed fails no other."""
    try:
        return classify(rows)
    except Exception as error:
        return [error] if len(rows) == 1 else [answered([row])[0] for row in rows]


async def compute():
    """Compute what has arrived during the batch before, whichever tasks it is for."""
    async with turn:
        batch, waiting[:] = waiting[:32], waiting[32:]
        found = await asyncio.to_thread(answered, batch) if batch else []
        for own, result in zip(batch, found, strict=True):
            own.append(result)


@app.post("/{task}")
async def post(task: str, text: Annotated[str, Body(embed=True)]) -> dict[str, float]:
    if task not in models:
        raise HTTPException(404, f"no task {task}: one of {', '.join(models)}")
    waiting.append(row := [task, text])
    await asyncio.shield(compute())  # others' rows, too, when this request is cancelled
    if isinstance(row[2], Exception):
        raise HTTPException(500, str(row[2]))
    return row[2]
