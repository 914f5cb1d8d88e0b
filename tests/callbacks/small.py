"""Tiny models and a plain loop that the tests of callbacks share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Net(nn.Module):
    """Everything that a snapshot has to cope with: tied weights, buffers, a scalar."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8, bias=False)
        self.third = nn.Linear(8, 8, bias=False)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs):
        hidden = self.norm(torch.tanh(self.first(inputs)))
        return self.scale * self.third(torch.tanh(self.second(hidden)))


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    ).to(dtype)


def lora_model(**options):
    from peft import LoraConfig, get_peft_model

    model = llama()
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, lora_dropout=0.5, **options)
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    spread(model, 0.0)
    return model


def spread(model, amount: float, seed: int = 0) -> None:
    """Move everything that is trained, as a step of training would, by large random steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype), alpha=amount)


MODULE = "model.layers.0.self_attn.q_proj"


def change(model):
    """What the active adapters add to the weight of `MODULE`, in float64."""
    layer = model.base_model.model.get_submodule(MODULE)
    total = 0
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        total = total + layer.scaling[name] * (b @ a)
    return total.detach()


def train(model, callbacks, steps: int, begin=True, amount=0.1, seen=lambda: None) -> list[dict]:
    """A loop with made-up steps, and a call of `seen` in each; returns the state after each."""
    states = []
    for callback in callbacks:
        if begin:
            callback.on_train_begin(0, model)
    for step in range(1, steps + 1):
        spread(model, amount, seed=step)
        seen()
        states.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        for callback in callbacks:
            callback.on_step_end(step, model)
    return states


def same(found, expected, **tolerance) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


def mean(states, names):
    return {k: torch.stack([s[k].double() for s in states]).mean(0).float() for k in names}
