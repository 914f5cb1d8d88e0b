"""Small real models, made on the spot and saved as ordinary Hugging Face checkpoints."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",  # version 1.1, which mergekit's table describes
        )
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "bert": bert, "t5": t5}


def family(
    folder: Path,
    make: Callable[[], PreTrainedModel],
    dtype: torch.dtype = torch.float32,
    amounts: Sequence[float] = (0.01, 0.02, 0.04),
) -> tuple[Path, list[Path]]:
    """Save a base and fine-tunes of it: low-rank plus a little dense noise, of several sizes."""
    torch.manual_seed(0)
    base = make().to(dtype)
    base.save_pretrained(folder / "base")
    tuned = []
    for index, amount in enumerate(amounts):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(_update(parameter).to(dtype), alpha=amount)
        tuned.append(folder / f"tuned{index}")
        model.save_pretrained(tuned[-1])
    return folder / "base", tuned


def _update(parameter: Tensor) -> Tensor:
    noise = 0.3 * torch.randn(parameter.shape)
    if parameter.ndim != 2:
        return noise
    rows, columns = parameter.shape
    return noise + torch.randn(rows, 2) @ torch.randn(2, columns)


def tokenizer(folder: Path, words: Iterable[str] = tuple(f"w{i}" for i in range(64))) -> None:
    """Save a tokenizer of whole words, whose first one stands for unknown ones."""
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = next(iter(vocabulary))
    made = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown).save_pretrained(folder)


def state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def config(
    method: str,
    models: Sequence[Path],
    base: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """A mergekit configuration, as the YAML would give it; of NAN with the paper's factor."""
    if str(method).startswith("nan"):
        parameters = {"scale": "paper", **(parameters or {})}
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model)} for model in models],
        **keys,
    }
    if base is not None:
        content["base_model"] = str(base)
    if parameters is not None:
        content["parameters"] = dict(parameters)
    return content


def command(
    name: str, *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an installed command of this environment, as a user would."""
    script = Path(sysconfig.get_path("scripts")) / name
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})},
        check=False,
    )


def command_here(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves the seconds that importing the libraries takes.

    An exception that it lets through is this test's failure.
    """
    import mergekit.scripts.multimerge
    import mergekit.scripts.run_yaml

    import mergekit_ext.cli
    import peft_merge.cli

    commands: Mapping[str, Any] = {
        "mergekit-ext": mergekit_ext.cli.main,
        "mergekit-multi": mergekit.scripts.multimerge.main,
        "mergekit-yaml": mergekit.scripts.run_yaml.main,
        "peft-merge": peft_merge.cli.main,
    }
    words = [str(argument) for argument in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = CliRunner().invoke(commands[name], words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path
