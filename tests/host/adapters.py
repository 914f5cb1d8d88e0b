"""Real adapters of small bases, and the models that PEFT merges them into."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from mergekit_ext.host.adapters.loader import ModelLoader, open_model
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.host.checks.report import CheckReport
from tests import models as small
from tests.peft_merge.models import randomise


def saved_base(folder: Path, make=small.llama, dtype: torch.dtype = torch.float32) -> Path:
    """A base as an ordinary checkpoint."""
    torch.manual_seed(0)
    make().to(dtype).save_pretrained(folder)
    return folder


def saved_adapter(base: Path, folder: Path, config: PeftConfig, seed: int, kind: type) -> Path:
    """An adapter of `base` with values as if trained; `kind` is the model's class."""
    model = quietly(lambda: get_peft_model(kind.from_pretrained(base), config))
    randomise(model, "default", seed)
    quietly(lambda: model.save_pretrained(folder))
    return folder


def merged_with_peft(base: Path, adapter: Path, folder: Path, kind: type) -> Path:
    """The whole model, as PEFT merges it in float32; stored in the base's dtype."""
    whole = kind.from_pretrained(base)
    dtype = whole.dtype
    model = quietly(lambda: PeftModel.from_pretrained(whole.float(), adapter))
    merged: PreTrainedModel = quietly(model.merge_and_unload)
    merged.to(dtype).save_pretrained(folder)
    return folder


def opened(model: str) -> ModelLoader:
    """The loader of ``base+adapter``."""
    reference = ModelReference.parse(model)
    base = ModelReference(model=reference.model)
    return open_model(reference, base.lazy_loader(), base.config())


def check(*models: str, method: str = "linear", **options) -> CheckReport:
    """What `mergekit-ext check` finds about a merge of these models."""
    content = small.config(method, [Path(model) for model in models], None, {"weight": 1.0})
    ((_, report),) = check_source(yaml.safe_dump(content), MergeOptions(**options))
    return report


def quietly(action):
    """Without PEFT's warnings, which are not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()
