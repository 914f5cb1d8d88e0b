"""Tiny real models and real PEFT adapters of them: one for each kind that is accepted.

kind = KINDS["rank_pattern"]
folder = saved(kind, tmp_path / "a", seed=1)   # a folder as save_pretrained writes it
model = reloaded(kind, folder)                 # PeftModel on a fresh copy of the base
answer(kind, model)                            # its output on the kind's fixed inputs
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    # Large enough that every part of an adapter is seen in the outputs.
    "initializer_range": 0.4,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_HEADS, tie_word_embeddings=False))


def tied_llama() -> nn.Module:
    sizes = {**_SIZES, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **_HEADS, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    sizes = {name: _SIZES[name] for name in ("vocab_size", "initializer_range")}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=16, **tokens)
    )


def bert() -> nn.Module:
    own = {"num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**_SIZES, **own))


def mixtral() -> nn.Module:
    sizes = {**_SIZES, "num_hidden_layers": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **_HEADS, **experts))


class Convolutions(nn.Module):
    """Convolutions of one to three dimensions, with groups and with a 1x1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 10, 3)
        self.volume = nn.Conv3d(10, 4, (1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.tanh(self.grouped(x)))
        x = torch.tanh(self.line(x.flatten(2)))
        return self.volume(x[:, :, None, :, None])


class Images(nn.Module):
    """What (IA)^3 can adapt of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """torch's attention, whose two projections PEFT adapts together."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class _Experts(nn.Module):
    is_transposed = True  # as in gpt-oss: (experts, in, out)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 10) / 3)
        self.down = nn.Parameter(torch.randn(3, 10, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.up) @ self.down).sum(0)


class Experts(nn.Module):
    """Stacked experts whose weights are stored with the inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = _Experts()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x))


class Named(nn.Module):
    """Module names of which one is the end of another."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.deep = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.deep["proj"](torch.tanh(self.proj(x)))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 9, 30, 2, 7], [3, 3, 31, 4, 8, 11]])}


def numbers(*shape: int) -> Callable[[], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(*shape, generator=generator)
    return lambda: {"x": values}


@dataclass(frozen=True)
class Kind:
    """One kind of adapter: a base, a PEFT config, inputs for both."""

    name: str
    base: Callable[[], nn.Module]
    config: Callable[[], PeftConfig]
    inputs: Callable[[], Mapping[str, Tensor]] = tokens

    @property
    def lora(self) -> bool:
        return not isinstance(self.config(), IA3Config)


KINDS: dict[str, Kind] = {}


def _lora(
    name: str,
    base: Callable[[], nn.Module] = llama,
    inputs: Callable[[], Mapping[str, Tensor]] = tokens,
    **fields: Any,
) -> None:
    known = LoraConfig.__dataclass_fields__
    initialisation = fields.get("init_lora_weights", True)
    if set(fields) - set(known) or str(initialisation) not in f"True{known['init_lora_weights']}":
        return  # of a newer PEFT than the installed one
    fields = {"r": 4, "lora_alpha": 6, **fields}
    KINDS[name] = Kind(name, base, lambda: LoraConfig(**copy.deepcopy(fields)), inputs)


def _ia3(
    name: str,
    base: Callable[[], nn.Module] = llama,
    inputs: Callable[[], Mapping[str, Tensor]] = tokens,
    **fields: Any,
) -> None:
    KINDS[name] = Kind(name, base, lambda: IA3Config(**copy.deepcopy(fields)), inputs)


_QV = ["q_proj", "v_proj"]
_lora("plain", target_modules=_QV, task_type="CAUSAL_LM")
_lora("regex", target_modules=r".*\.layers\.1\..*\.(up_proj|down_proj)")
_lora("one_layer", target_modules=_QV, layers_to_transform=[1])
_lora("excluded", target_modules="all-linear", exclude_modules=["gate_proj", "lm_head"])
_lora("rank_one", target_modules=["o_proj"], r=1, lora_alpha=1)
_lora("rslora", target_modules=_QV, use_rslora=True)
_lora(
    "patterns",
    target_modules=[*_QV, "up_proj"],
    rank_pattern={"v_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 3},
    alpha_pattern={"q_proj": 5, "layers.0.mlp.up_proj": 9},
)
_lora(
    "rslora_patterns",
    target_modules=_QV,
    use_rslora=True,
    rank_pattern={"v_proj": 2},
    alpha_pattern={"layers.1.self_attn.v_proj": 1},
)
_lora("lora_bias", bert, target_modules=["query", "value"], lora_bias=True)
_lora("bias_all", bert, target_modules=["query", "dense"], bias="all", task_type="SEQ_CLS")
_lora("bias_lora_only", bert, target_modules=["query"], bias="lora_only")
_lora("modules_to_save", bert, target_modules=["query", "value"], task_type="SEQ_CLS")
_lora("saved_embedding", target_modules=_QV, modules_to_save=["embed_tokens", "lm_head"])
_lora("conv1d_transformers", gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
_lora("embedding", target_modules=["embed_tokens", "q_proj"])
_lora("tied_factors", tied_llama, target_modules=["embed_tokens"], ensure_weight_tying=True)
_lora(
    "tied_saved",
    tied_llama,
    target_modules=["q_proj"],
    modules_to_save=["embed_tokens"],
    ensure_weight_tying=True,
)
_lora("velora", target_modules=_QV, velora_config={"num_groups": 4})
_lora("eva", target_modules=_QV, init_lora_weights="eva", eva_config=EvaConfig())
_lora("parameters", mixtral, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
_lora(
    "nested_parameters",
    mixtral,
    target_modules=["q_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    rank_pattern={r"experts\.[a-z_]+_proj": 2},
)
_lora(
    "bare_parameters",
    mixtral,
    target_modules=["q_proj"],
    target_parameters=["down_proj"],
    alpha_pattern={"q_proj": 3},
    rank_pattern={"q_proj": 2},
)
_lora(
    "transposed_parameters",
    Experts,
    numbers(2, 6),
    target_modules=["head"],
    target_parameters=["experts.up", "experts.down"],
)
_lora(
    "plain_parameter", Experts, numbers(2, 6), target_modules=[], target_parameters=["head.weight"]
)
_lora(
    "convolutions",
    Convolutions,
    numbers(2, 6, 4, 4),
    target_modules=["grouped", "point", "line", "volume"],
    lora_bias=True,
)
_lora("attention", Attention, numbers(2, 3, 16), target_modules=["attention", "head"])
_lora("named", Named, numbers(2, 6), target_modules=r"proj", rank_pattern={"proj": 2})
_lora("replicated", target_modules=_QV, layer_replication=[(0, 2), (1, 2)])
_lora("gaussian", target_modules=_QV, init_lora_weights="gaussian")
_lora("orthogonal", target_modules=_QV, init_lora_weights="orthogonal")
_lora("mica", target_modules=_QV, init_lora_weights="mica")
_ia3("ia3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
_ia3("ia3_attention", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
_ia3(
    "ia3_conv1d_transformers",
    gpt2,
    target_modules=["c_attn", "mlp.c_proj"],
    feedforward_modules=["mlp.c_proj"],
    fan_in_fan_out=True,
)
_ia3(
    "ia3_modules_to_save",
    bert,
    target_modules=["key", "output.dense"],
    feedforward_modules=["output.dense"],
    task_type="SEQ_CLS",
)
_ia3(
    "ia3_convolutions",
    Images,
    numbers(2, 3, 7, 7),
    target_modules=["first", "second"],
    feedforward_modules=["second"],
)


def base(kind: Kind) -> nn.Module:
    """The kind's base model, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return kind.base().eval()


def adapted(kind: Kind, seed: int, config: PeftConfig | None = None) -> PeftModel:
    """A PeftModel whose adapter "default" has values as if trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(kind), config or kind.config())
    randomise(model, "default", seed)
    return model.eval()


def add(model: PeftModel, name: str, config: PeftConfig, seed: int) -> None:
    """Add a further adapter to a PeftModel, with values as if trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, config)
    randomise(model, name, seed)
    model.eval()


def randomise(model: PeftModel, name: str, seed: int) -> None:
    """Fill all that the adapter trains: factors, vectors (around 1), saved modules, biases."""
    generator = torch.Generator().manual_seed(seed)
    trained = model.peft_config[name]
    biases = getattr(trained, "bias", "none") != "none"
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            own = f".{name}." in f".{key}."
            if not own and not (biases and tensor.requires_grad and key.endswith("bias")):
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if ".ia3_l." in key:
                tensor.copy_(1 + 0.3 * noise)
            elif ".lora_" in key:
                tensor.copy_(0.5 * noise)
            else:
                tensor.add_(0.3 * noise)


def saved(
    kind: Kind, folder: Path, seed: int, dtype: torch.dtype | None = None, **changes: Any
) -> Path:
    """Make an adapter and write it; `changes` are fields of the config that differ."""
    config = kind.config()
    for field_name, value in changes.items():
        assert hasattr(config, field_name), field_name
        setattr(config, field_name, value)
    model = adapted(kind, seed, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    if dtype is not None:
        cast(folder, dtype)
    return folder


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Store an adapter's tensors in another dtype."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})


def reloaded(kind: Kind, folder: Path) -> PeftModel:
    """An adapter's folder on a fresh base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base(kind), folder).eval()


def answer(kind: Kind, model: nn.Module) -> Tensor:
    """The model's output on the kind's inputs, in float64 for comparison."""
    with torch.no_grad():
        result = model(**kind.inputs())
    return (result if isinstance(result, Tensor) else result.logits).to(torch.float64)
