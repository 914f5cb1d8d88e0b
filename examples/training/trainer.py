"""``python -m examples.training.trainer``: the same callbacks in transformers' Trainer."""

from __future__ import annotations

import argparse
import tempfile
import time

from transformers import Trainer, TrainingArguments

from mergekit_ext.callbacks import as_trainer_callback

from .digits import FULL, QUICK, Run, load_digits, new_model
from .scores import merges, table


def train(run: Run) -> str:
    """Train, merge, and return the table."""
    data, model = load_digits(run.seed), new_model(run.seed)
    callbacks = merges(run, data)
    rows = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(data.images, data.labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=run.steps,
                per_device_train_batch_size=run.batch,
                dataloader_drop_last=True,
                learning_rate=run.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                seed=run.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            callbacks=[as_trainer_callback(callback) for callback in callbacks.values()],
        )
        trainer.train()
    return table(callbacks)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    started = time.perf_counter()
    print(train(QUICK if parser.parse_args().quick else FULL))
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
