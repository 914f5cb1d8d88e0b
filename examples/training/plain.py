"""``python -m examples.training.plain``: an accelerate loop that merges its last checkpoints."""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from .digits import FULL, QUICK, Run, load_digits, new_model
from .scores import merges, table


def train(run: Run) -> str:
    """Train, merge, and return the table."""
    accelerator = Accelerator(cpu=True)
    data, model = load_digits(run.seed), new_model(run.seed)
    callbacks = merges(run, data)
    # Saved and loaded with the state of the run.
    accelerator.register_for_checkpointing(*callbacks.values())
    batches = DataLoader(
        TensorDataset(data.images, data.labels),
        batch_size=run.batch,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(run.seed),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    for callback in callbacks.values():
        callback.on_train_begin(0, model)
    step = 0
    while step < run.steps:
        for images, labels in batches:
            step += 1
            accelerator.backward(model(pixel_values=images, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
            for callback in callbacks.values():
                callback.on_step_end(step, model)
            if step == run.steps:
                break
    for callback in callbacks.values():
        callback.on_train_end(step, model)
    return table(callbacks) if accelerator.is_main_process else ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    started = time.perf_counter()
    print(train(QUICK if parser.parse_args().quick else FULL))
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
