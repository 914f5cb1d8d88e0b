"""A script for two processes: an accelerate loop, and what each process saw as JSON.

Argument: the folder for the results.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from mergekit_ext.callbacks import Evaluate, LogTo, MergeCheckpoints
from mergekit_ext.callbacks.trainer import from_main
from mergekit_ext.errors import MergeError
from tests.callbacks.diary import Diary
from tests.callbacks.small import llama, lora_model
from tests.models import state


class Log:
    """A tracker."""

    def __init__(self):
        self.steps = []

    def log(self, values, step):
        self.steps.append(step)


def tokens(rank: int, step: int):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(32, (2, 6), generator=generator)


def fit(accelerator, model, callbacks, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    for callback in callbacks:
        callback.on_train_begin(0, model)
    states = []
    for step in range(1, steps + 1):
        batch = tokens(accelerator.process_index, step)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        inner = accelerator.unwrap_model(model)
        states.append({k: v.clone() for k, v in inner.state_dict().items()})
        for callback in callbacks:
            callback.on_step_end(step, model)
    for callback in callbacks:
        callback.on_train_end(steps, model)
    return accelerator.unwrap_model(model), states


def train(accelerator):
    diary, calls = Diary(), []
    lore = MergeCheckpoints(
        "lore",
        keep=3,
        parameters={"mu_relative": 0.2},
        evaluate=Evaluate(lambda model, task: calls.append(task) or {"score": len(calls)}),
        load=True,
        keep_better=True,
        callbacks=[diary],
    )
    model, states = fit(accelerator, llama(tied=True), [diary, lore])
    saved = accelerator.is_main_process
    held = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    if saved:
        merged = state(lore.result.path)
        assert all(torch.equal(held[k], merged[k]) for k in held)
        key = "model.layers.0.mlp.up_proj.weight"
        assert not torch.allclose(merged[key], states[-1][key])
    adapter = lora_model()
    linear = MergeCheckpoints("linear", keep=2, load=True)
    adapted, _ = fit(accelerator, adapter, [linear, LogTo(Log())])
    logits = adapted.eval()(input_ids=tokens(0, 0)).logits
    return {
        "steps": diary.steps,
        "norms": diary.norms,
        "merges": diary.merges,
        "kept": list(lore.steps),
        "calls": len(calls),
        "result": lore.result is not None,
        "weights": float(sum(t.double().sum() for t in held.values())),
        "active": adapted.active_adapters,
        "logits": float(logits.detach().double().square().sum()),
    }


def fail(accelerator):
    def broken(model, task):
        raise RuntimeError("no score today")

    try:
        fit(accelerator, llama(), [MergeCheckpoints("average", evaluate=broken, load=True)])
    except (RuntimeError, MergeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def interrupted(accelerator):
    def stop():
        raise KeyboardInterrupt

    try:
        from_main(stop)
    except (KeyboardInterrupt, MergeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def misfit(accelerator):
    average = MergeCheckpoints("average", load=True)
    average.on_step_end(1, llama())
    try:
        average.merge(model=torch.nn.Linear(2, 2))
    except (MergeError, RuntimeError) as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = {
        **train(accelerator),
        "error": fail(accelerator),
        "interrupted": interrupted(accelerator),
        "misfit": misfit(accelerator),
        "processes": accelerator.num_processes,
    }
    path = Path(sys.argv[1]) / f"rank{accelerator.process_index}.json"
    path.write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # torch's threads that outlive the group can abort the interpreter while it shuts down.
    os._exit(0)
