"""A row's models: a base, two fine-tunes and an adapter, in memory and as a user saves them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.matrix import reference
from tests.matrix.row import Row

TASKS = ("one", "two")


class Family:
    """The models of one row, in folders `base`, `one`, `two` and `adapter`."""

    def __init__(self, row: Row, folder: Path):
        self.row, self.folder = row, folder
        torch.manual_seed(0)
        self.base = _moved(row.make().eval(), 0, 0.02)
        self.tuned = [_moved(copy.deepcopy(self.base), n, 0.03 * n) for n in (1, 2)]
        for name, model in zip(("base", *TASKS), (self.base, *self.tuned), strict=True):
            model.save_pretrained(folder / name)
        torch.manual_seed(3)
        settings = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(row.lora),
            target_parameters=list(row.stacks),
            init_lora_weights=False,
        )
        model = get_peft_model(type(self.base).from_pretrained(folder / "base"), settings)
        model.save_pretrained(folder / "adapter")
        self.adapted = state_of(model.merge_and_unload())

    def expected(self, rule: reference.Rule) -> dict[str, Tensor]:
        """What a rule makes of the tensors that float."""
        return reference.merged(rule, state_of(self.base), [*map(state_of, self.tuned)])

    def tasks(self, rule: reference.Rule) -> dict[str, dict[str, Tensor]]:
        """The same for each task, whose heads and counters stay its own."""
        shared = self.expected(rule)
        return {
            task: shared
            | {
                name: tensor
                for name, tensor in state_of(model).items()
                if name.split(".")[0] in self.row.heads or not tensor.is_floating_point()
            }
            for task, model in zip(TASKS, self.tuned, strict=True)
        }


def _moved(model: PreTrainedModel, seed: int, amount: float) -> PreTrainedModel:
    """The model after noise on all that training changes, and a step of its counters."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]  # others may not be saved
    saved = {id(t) for t in model.state_dict(keep_vars=True).values()}
    with torch.no_grad():
        for tensor in [*trained, *(b for b in model.buffers() if id(b) in saved)]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=amount)
            else:
                tensor.add_(seed)
    return model


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
