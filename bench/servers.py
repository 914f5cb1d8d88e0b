"""What `decompose` writes, read by vLLM's own loading code and run by llama.cpp.

    pip download --no-deps vllm
    pip download --no-deps --no-binary :all: llama-cpp-python     # and unpack both
    python -m bench.servers --vllm UNPACKED --llama-cpp UNPACKED --python INTERPRETER

Two small Llamas are decomposed, with ranks by module and with `uniform_rank`. Those modules of vLLM
that read an adapter run with the rest of it replaced by stand-ins; the change of every weight that
they make is compared with PEFT's. llama.cpp's converters run as they are, and logits of its
library (INTERPRETER has llama-cpp-python) are compared with PEFT's. Needs sentencepiece.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import yaml
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import mergekit_ext

TASKS = ("chat", "code")
FORMS = {"ranks by module": {}, "uniform_rank": {"uniform_rank": True}}
TOKENS = [1, 5, 9, 40, 77, 300]
_READING = ("peft_helper", "lora_model", "lora_weights", "utils")  # of vllm.lora
_LOGITS = """
import json, sys
from llama_cpp import Llama
model, lora, tokens = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
llama = Llama(model, lora_path=lora, logits_all=True, n_ctx=64, verbose=False, n_threads=1)
llama.eval(tokens)
print(json.dumps([[float(x) for x in row] for row in llama.scores[: len(tokens)]]))
"""


def make_models(folder: Path) -> None:
    """Write a base and two models whose matrices differ from its by falling singular values."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=os.fspath(Path(__file__).with_name("README.md")),
        model_prefix=os.fspath(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, vocab_size=512, max_position_embeddings=128)
    base = LlamaForCausalLM(config).state_dict()
    base = {name: 4 * tensor if tensor.dim() == 2 else tensor for name, tensor in base.items()}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name in ("base", *TASKS):
        model = LlamaForCausalLM(config)
        changed = {n: t if name == "base" else _changed(t) for n, t in base.items()}
        model.load_state_dict(changed)
        model.save_pretrained(folder / name)
        shutil.copy(folder / "tokenizer.model", folder / name)
        settings = {"tokenizer_class": "LlamaTokenizer", **special}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def _changed(tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(tensor)
    if tensor.dim() != 2:
        return tensor + 0.05 * noise
    u, sigma, v = torch.linalg.svd(noise, full_matrices=False)
    return tensor + 0.2 * u @ torch.diag(sigma / torch.arange(1, len(sigma) + 1)) @ v


def decomposed(folder: Path, form: str) -> Path:
    """Return base and adapters of the two models in 1.3 models."""
    out = folder / form.replace(" ", "-")
    config = {
        "merge_method": "decompose",
        "base_model": os.fspath(folder / "base"),
        "models": [{"model": os.fspath(folder / task)} for task in TASKS],
        "parameters": {"target_size": 1.3, **FORMS[form]},
    }
    mergekit_ext.merge(yaml.safe_dump(config), out)
    return out


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of vLLM that read adapters, and stand-ins for all others."""

    def __init__(self, root: Path):
        self._root = root

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] != "vllm":
            return None
        if name in (f"vllm.lora.{module}" for module in _READING):
            place = self._root / f"{name.replace('.', '/')}.py"
            return importlib.util.spec_from_file_location(name, place)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module: Any = MagicMock(PIN_MEMORY=False, __path__=[], __spec__=spec)
        module.__name__ = spec.name
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        pass


def adapted(out: Path, task: str) -> Any:
    """Return the base with one adapter, as PEFT loads them."""
    base = LlamaForCausalLM.from_pretrained(out / "base")
    return PeftModel.from_pretrained(base, out / task).eval()


def read_by_vllm(out: Path, task: str) -> tuple[int, float]:
    """Return how many weights vLLM changes, and how far its changes are from PEFT's."""
    helper_of = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
    model_of = importlib.import_module("vllm.lora.lora_model").LoRAModel
    modules = {
        name: module
        for name, module in adapted(out, task).base_model.model.named_modules()
        if hasattr(module, "get_delta_weight") and module.r
    }
    helper = helper_of.from_local_dir(os.fspath(out / task), None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=16))
    found = model_of.from_local_checkpoint(
        os.fspath(out / task),
        {name.rpartition(".")[2] for name in modules},
        helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    ).loras
    if found.keys() != modules.keys():
        raise SystemExit(f"vLLM reads {sorted(found)}, PEFT {sorted(modules)}")
    furthest = 0.0
    for name, lora in found.items():
        change = lora.lora_b @ lora.lora_a * lora.scaling
        expected = modules[name].get_delta_weight("default")
        change = change.T if change.shape != expected.shape else change
        furthest = max(furthest, float((change - expected).abs().max()))
    return len(found), furthest


def run_by_llama_cpp(out: Path, task: str, source: Path, python: str) -> tuple[float, float]:
    """Return how far logits are from PEFT's, and how far PEFT's are from the base's."""
    base, lora = out / "base.gguf", out / f"{task}.gguf"
    scripts = next(source.glob("**/convert_lora_to_gguf.py")).parent

    def convert(script: str, *args: str | Path) -> None:
        command = [sys.executable, scripts / script, *args, "--outtype", "f32"]
        subprocess.run(command, check=True, capture_output=True)

    if not base.exists():
        convert("convert_hf_to_gguf.py", out / "base", "--outfile", base)
    convert("convert_lora_to_gguf.py", out / task, "--base", out / "base", "--outfile", lora)
    command = [python, "-c", _LOGITS, base, lora, json.dumps(TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    model, tokens = adapted(out, task), torch.tensor([TOKENS])
    with torch.inference_mode():
        expected = model(tokens).logits[0]
        with model.disable_adapter():
            plain = model(tokens).logits[0]
    found = torch.tensor(json.loads(done.stdout))
    return float((found - expected).abs().max()), float((plain - expected).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        make_models(Path(place))
        if args.vllm:
            sys.meta_path.insert(0, _StandIns(args.vllm))
        for form in FORMS:
            out = decomposed(Path(place), form)
            for task in TASKS if args.vllm else ():
                weights, furthest = read_by_vllm(out, task)
                print(f"vLLM, {form}, {task}: {weights} weights, {furthest:.1e} from PEFT's")
            for task in TASKS if args.llama_cpp else ():
                off, change = run_by_llama_cpp(out, task, args.llama_cpp, args.python)
                print(
                    f"llama.cpp, {form}, {task}: logits {off:.1e} from PEFT's, which the adapter "
                    f"changes by {change:.1e}"
                )


if __name__ == "__main__":
    main()
