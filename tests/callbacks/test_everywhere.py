"""One callback class, unchanged: a merge, a plain loop, two accelerate processes, a Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions
from transformers import Trainer, TrainingArguments

import mergekit_ext
from mergekit_ext.callbacks import LogTo, MergeCheckpoints, as_trainer_callback
from mergekit_ext.errors import ConfigError, MergeWarning
from tests import models
from tests.callbacks.diary import Diary
from tests.callbacks.small import llama, lora_model, same

ROOT = Path(__file__).resolve().parents[2]


def test_a_merge(tmp_path):
    import yaml

    _, tuned = models.family(tmp_path, llama, amounts=(0.1, 0.2))
    config = yaml.safe_dump(models.config("nan", tuned, tmp_path / "base"))
    diary = Diary()
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit_ext.merge(config, tmp_path / "out", options, callbacks=[diary])
    assert diary.merges == ["nan"] and not diary.steps
    assert "model.layers.0.mlp.up_proj.weight" in diary.tensors


def test_an_accelerate_loop_with_two_processes(tmp_path):
    script = ROOT / "tests/callbacks/two_processes.py"
    # `accelerate launch` itself starts several processes on CPUs only through MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", str(script), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for rank in (main, other):
        assert rank["processes"] == 2
        assert rank["steps"] == [0, 1, 2, 3]
        assert rank["active"] == ["merged"]
    assert main["norms"] == pytest.approx(other["norms"])
    # Snapshots, merges and evaluations are the main process's; what is loaded is everybody's.
    assert (main["merges"], main["kept"], main["calls"]) == (["lore"], [1, 2, 3], 2)
    assert (other["merges"], other["kept"], other["calls"]) == ([], [], 0)
    assert main["result"] and not other["result"]
    assert main["weights"] == other["weights"]
    assert main["logits"] == pytest.approx(other["logits"], rel=1e-6)
    # A merge that fails in the main process stops the others with its reason.
    assert (main["misfit"], other["misfit"]) == ("RuntimeError", "MergeError")
    assert main["error"] == "RuntimeError: no score today"
    failed = "MergeError: the main process could not merge: "
    assert other["error"].startswith(f"{failed}RuntimeError")
    assert main["interrupted"].startswith("KeyboardInterrupt")
    assert other["interrupted"].startswith(f"{failed}KeyboardInterrupt")


def trainer(folder: Path, model, callbacks, steps: int, **options) -> Trainer:
    rows = torch.randint(32, (24, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    wrapped = [as_trainer_callback(callback) for callback in callbacks]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=wrapped)


class Log:
    def __init__(self):
        self.lines = []

    def log(self, values, step=None):
        self.lines.append((step, sorted(values)))


def test_a_trainer_run(tmp_path):
    diary, log = Diary(), Log()
    model = llama()
    ema = MergeCheckpoints("average", every=1)
    saved = MergeCheckpoints("lore", on="save", keep=3, parameters={"mu_relative": 0.1}, load=True)
    trainer(tmp_path, model, [diary, LogTo(log), ema, saved], steps=6).train()
    assert diary.steps == list(range(7)) and diary.ends == [6]
    assert diary.saves == [(s, str(tmp_path / f"checkpoint-{s}")) for s in (2, 4, 6)]
    assert diary.logs[0][0] == 2 and "loss" in diary.logs[0][1]
    assert [step for step, _ in log.lines][:3] == [2, 4, 6]
    assert ema.steps == (1, 2, 3, 4, 5, 6) and ema.result.steps == ema.steps
    assert saved.result.loaded and saved.result.steps == (2, 4, 6)
    same(dict(model.state_dict()), models.state(saved.result.path), rtol=0, atol=0)


def test_a_trainer_run_of_an_adapter(tmp_path):
    model = lora_model()
    live = MergeCheckpoints("linear", keep=2, every=2)
    saved = MergeCheckpoints("linear", keep=2, on="save")
    trainer(tmp_path, model, [live, saved], steps=4).train()
    assert live.result.steps == saved.result.steps == (2, 4)
    same(models.state(live.result.path), models.state(saved.result.path))


def test_a_trainer_resumes_with_the_callbacks_state(tmp_path):
    def run(folder, steps, resume=None):
        callbacks = [
            MergeCheckpoints("average"),
            MergeCheckpoints("ties", keep=5, where=folder / "snapshots"),
        ]
        # States of several callbacks of one class lie beside each other.
        trainer(folder, llama(), callbacks, steps).train(resume_from_checkpoint=resume)
        return callbacks

    whole = run(tmp_path / "whole", 6)
    with (
        pytest.warns(MergeWarning, match=r"there is no .*callback_MergeCheckpoints.*\.pt: it"),
        pytest.raises(ConfigError, match="load the state of the run that is resumed"),
    ):
        run(tmp_path / "elsewhere", 6, resume=str(tmp_path / "whole/checkpoint-4"))
    run(tmp_path / "parts", 4)
    parts = run(tmp_path / "parts", 6, resume=str(tmp_path / "parts/checkpoint-4"))
    for one, other in zip(whole, parts, strict=True):
        assert one.result.steps == other.result.steps
        same(models.state(other.result.path), models.state(one.result.path))


def test_errors_of_callbacks_stop_a_trainer(tmp_path):
    with pytest.raises(ConfigError, match="none of mu, mu_relative, rank_ratio"):
        trainer(tmp_path, llama(), [MergeCheckpoints("lore")], steps=2).train()
