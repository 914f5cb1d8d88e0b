"""Adapters applied to a base's own tensors, against PEFT's own merge on real models."""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError
from peft_merge.adapter import Ia3Adapter, LoraAdapter, ModuleInfo, Update, VectorInfo
from peft_merge.io.read import adapters_of, load_adapter
from peft_merge.matching import class_orientation, match
from tests.peft_merge import models

REFUSED = {"transposed_parameters", "convolutions", "attention", "replicated"}
# PEFT's merge adds the one change of tied weights twice to what it has in memory once.
TIED = {"tied_factors"}
ACCEPTED = sorted(set(models.KINDS) - REFUSED - TIED)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def applied(adapter, base, model=None):
    known = [] if model is None else [partial(class_orientation, model)]
    weights = match(adapter, shapes(base), *known)
    return {name: weights.apply(name, tensor) for name, tensor in base.items()}


def merged_by_peft(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload().state_dict()


def check(kind, folder):
    model = models.base(kind)
    base = model.state_dict()
    before = {name: tensor.clone() for name, tensor in base.items()}
    adapter = load_adapter(folder)
    weights = match(adapter, shapes(base), partial(class_orientation, model))
    ours = {name: weights.apply(name, tensor) for name, tensor in base.items()}
    theirs = merged_by_peft(models.reloaded(kind, folder))
    assert weights.added == {}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(base[name], before[name])
        if name not in weights.touched:
            assert tensor is base[name]
    changed = {name for name in ours if not torch.equal(theirs[name], base[name])}
    assert changed and changed <= weights.touched


@pytest.mark.parametrize("name", ACCEPTED)
def test_equals_the_merge_of_peft(name, tmp_path):
    kind = models.KINDS[name]
    check(kind, models.saved(kind, tmp_path / "a", 1))


@pytest.mark.parametrize("head_stored", [True, False])
@pytest.mark.parametrize("name", ["tied_factors", "tied_saved"])
def test_tied_weights_are_changed_once(name, head_stored, tmp_path):
    kind = models.KINDS[name]
    folder = models.saved(kind, tmp_path / "a", 1)
    plain = models.base(kind)
    base = dict(plain.state_dict())
    if not head_stored:
        del base["lm_head.weight"]
    ours = applied(load_adapter(folder), base, plain)
    plain.load_state_dict(ours, strict=False)
    plain.tie_weights()
    expected = models.answer(kind, models.reloaded(kind, folder))
    torch.testing.assert_close(models.answer(kind, plain), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_not_stored_is_only_left_out_if_it_is_tied(tmp_path):
    kind = models.KINDS["tied_factors"]
    adapter = load_adapter(models.saved(kind, tmp_path / "a", 1))
    base = dict(models.base(kind).state_dict())
    del base["lm_head.weight"]
    loads = {name: adapter.load(name) for name in adapter.infos}
    loads["lm_head"] = dataclasses.replace(loads["lm_head"], scale=9.0)
    with pytest.raises(ConfigError, match="lm_head"):
        applied(dataclasses.replace(adapter, load=loads.__getitem__), base, models.base(kind))


@pytest.mark.parametrize("target", ["point", "line", "volume"])
def test_convolutions_without_groups(target, tmp_path):
    """By outputs: PEFT cannot merge a three-dimensional one with a kernel that starts 1 x 1."""
    kind = models.KINDS["convolutions"]
    folder = models.saved(kind, tmp_path / "a", 1, target_modules=[target])
    plain = models.base(kind)
    plain.load_state_dict(applied(load_adapter(folder), plain.state_dict()))
    expected = models.answer(kind, models.reloaded(kind, folder))
    torch.testing.assert_close(models.answer(kind, plain), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["experts.up", "experts.down"])
def test_experts_stored_with_the_inputs_first(target, tmp_path):
    kind = models.KINDS["transposed_parameters"]
    check(kind, models.saved(kind, tmp_path / "a", 1, target_parameters=[target]))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_no_change_of_a_weight_is_refused(name, tmp_path):
    kind = models.KINDS[name]
    adapter = load_adapter(models.saved(kind, tmp_path / "a", 1))
    reason = {
        "transposed_parameters": "experts.down, experts.up",
        "convolutions": "2 groups",
        "attention": "twice",
        "replicated": "layer_replication",
    }[name]
    with pytest.raises(ConfigError, match=reason):
        match(adapter, shapes(models.base(kind).state_dict()))


@pytest.mark.parametrize("name", ["plain", "lora_bias", "modules_to_save", "ia3", "embedding"])
def test_half_precision_is_rounded_once(name, tmp_path):
    kind = models.KINDS[name]
    folder = models.saved(kind, tmp_path / "a", 1, torch.bfloat16)
    adapter = load_adapter(folder)
    model = models.base(kind)
    half = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    wide = applied(adapter, {k: tensor.to(torch.float64) for k, tensor in half.items()}, model)
    ours = applied(adapter, half, model)
    for key, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        wrong = tensor != wide[key].to(torch.bfloat16)
        # float32 sums may fall on the other side of a rounding boundary, very rarely
        assert wrong.float().mean() <= 0.01
    assert wide["lm_head.weight" if "lm_head.weight" in wide else "classifier.weight"].dtype == (
        torch.float64
    )


@pytest.mark.parametrize("feedforward", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions_of_ia3(feedforward, groups):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(8, 12, 3, groups=groups))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    model = get_peft_model(net, config)
    models.randomise(model, "default", 4)
    vector = model.base_model.model[0].ia3_l["default"].detach().clone()
    info = VectorInfo(tuple(vector.shape), feedforward)
    adapter = Ia3Adapter("a", {}, {"0": info}, {"0": vector}.__getitem__)
    x = torch.randn(2, 8, 5, 5)
    plain = nn.Conv2d(8, 12, 3, groups=groups)
    plain.load_state_dict({k[2:]: v for k, v in applied(adapter, base).items()})
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def lora(module, rows, columns, **fields):
    return several({module: (1, rows, columns)}, **fields)


def several(sizes, layout="linear", config=None, saved=None, bias=False):
    generator = torch.Generator().manual_seed(1)
    updates, infos = {}, {}
    for module, (count, rows, columns) in sizes.items():
        a = torch.randn(count, 2, columns, generator=generator)
        b = torch.randn(count, rows, 2, generator=generator)
        updates[module] = Update(a, b, 0.5, torch.ones(rows) if bias else None)
        infos[module] = ModuleInfo(layout, count, rows, columns, 2, (), bias)
    stored = {name: (lambda tensor=tensor: tensor) for name, tensor in (saved or {}).items()}
    return LoraAdapter("a", config or {}, infos, updates.__getitem__, stored)


@pytest.mark.parametrize(("inside", "outside"), [("bert.", ""), ("", "bert."), ("a.b.", "")])
def test_one_outer_prefix_may_differ(inside, outside):
    adapter = several({f"{inside}encoder.q": (1, 4, 6), f"{inside}encoder.v": (1, 4, 6)})
    base = {f"{outside}encoder.q.weight": torch.zeros(4, 6)}
    base |= {f"{outside}encoder.v.weight": torch.zeros(4, 6), "head.weight": torch.zeros(2, 4)}
    ours = applied(adapter, base)
    for part in ("q", "v"):
        torch.testing.assert_close(
            ours[f"{outside}encoder.{part}.weight"],
            adapter.load(f"{inside}encoder.{part}").dense()[0].float(),
        )


def test_saved_tensors_follow_the_prefix_or_are_added():
    saved = {"bert.pooler.bias": torch.ones(3), "classifier.bias": torch.full((2,), 7.0)}
    adapter = several({"bert.q": (1, 4, 6)}, saved=saved)
    weights = match(adapter, {"q.weight": (4, 6), "pooler.bias": (3,)})
    assert weights.weights == {"q.weight": "bert.q"}
    assert weights.saved == {"pooler.bias": "bert.pooler.bias"}
    assert torch.equal(weights.apply("pooler.bias", torch.zeros(3)), torch.ones(3))
    assert list(weights.added) == ["classifier.bias"]
    assert torch.equal(weights.added["classifier.bias"](), torch.full((2,), 7.0))


def test_a_saved_weight_is_adapted_too():
    """PEFT stores a resized or trained base weight below the adapted embedding."""
    saved = {"embed.base_layer.weight": torch.full((6, 4), 3.0)}
    adapter = several({"embed": (1, 4, 6)}, layout="embedding", saved=saved)
    ours = applied(adapter, {"embed.weight": torch.zeros(6, 4)})
    expected = 3 + adapter.load("embed").dense()[0].T
    torch.testing.assert_close(ours["embed.weight"], expected.float())


def test_two_places_that_fit_are_not_chosen_from():
    base = {"text.q.weight": (4, 6), "vision.q.weight": (4, 6)}
    with pytest.raises(ConfigError, match=r"text\.q\.weight, vision\.q\.weight"):
        match(lora("q", 4, 6), base)


def test_modules_without_a_tensor_are_listed():
    adapter = several({f"layers.{i}.q": (1, 4, 6) for i in range(9)})
    base = {f"layers.{i}.q.weight": (4, 6) for i in range(1)}
    with pytest.raises(ConfigError, match=r"8 adapted modules.*layers\.1\.q.* and 2 more"):
        match(adapter, base)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_square_weight_is_stored_as_the_others_are(transposed, flag):
    """And not as the flag says, which is that of the layer that PEFT adapted last."""
    config = {"fan_in_fan_out": flag}
    adapter = several({"c_attn": (1, 8, 4), "c_proj": (1, 4, 4)}, config=config)
    base = {"c_proj.weight": torch.zeros(4, 4)}
    base["c_attn.weight"] = torch.zeros(4, 8) if transposed else torch.zeros(8, 4)
    delta = adapter.load("c_proj").dense()[0].float()
    ours = applied(adapter, base)["c_proj.weight"]
    torch.testing.assert_close(ours, delta.T if transposed else delta)
    base["head.weight"] = base["c_attn.weight"].T  # the others do not agree
    sizes = {"c_attn": (1, 8, 4), "c_proj": (1, 4, 4), "head": (1, 8, 4)}
    with pytest.raises(ConfigError, match=r"c_proj\.weight.*a class of transformers"):
        applied(several(sizes, config=config), base)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("vector", [None, True, False])
def test_the_class_decides_about_square_weights(vector, flag):
    """Whatever the adapter's other layers are: a Linear and a Conv1D, both square."""
    square = nn.ModuleDict({"linear": nn.Linear(4, 4), "conv": Conv1D(4, 4)})
    base = {name: tensor.clone() for name, tensor in square.state_dict().items()}
    if vector is None:
        config = LoraConfig(r=2, target_modules=["linear", "conv"])
    else:
        names = ["linear", "conv"] if vector else []
        config = IA3Config(target_modules=["linear", "conv"], feedforward_modules=names)
    model = get_peft_model(square, config)
    models.randomise(model, "default", 3)
    (adapter,) = adapters_of(model, ["default"])
    ours = applied(
        dataclasses.replace(adapter, config={**adapter.config, "fan_in_fan_out": flag}),
        base,
        nn.ModuleDict({"linear": nn.Linear(4, 4), "conv": Conv1D(4, 4)}),
    )
    theirs = merged_by_peft(model)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])
        assert not torch.equal(tensor, base[name]) or name.endswith("bias")


@pytest.mark.parametrize("first", [(3, 8, 4), (3, 4, 8)])
def test_square_experts_are_stored_as_their_siblings_are(first):
    config = {"target_parameters": ["experts.up", "experts.down"]}
    sizes = {"experts.base_layer": (3, 8, 4), "experts": (3, 4, 4)}
    adapter = several(sizes, layout="parameter", config=config)
    base = {"experts.up": torch.zeros(first), "experts.down": torch.zeros(3, 4, 4)}
    delta = adapter.load("experts").dense().float()
    ours = applied(adapter, base)["experts.down"]
    torch.testing.assert_close(ours, delta if first == (3, 8, 4) else delta.mT)


def test_square_experts_alone_are_refused():
    config = {"target_parameters": ["experts.down"]}
    adapter = several({"experts": (3, 4, 4)}, layout="parameter", config=config)
    with pytest.raises(ConfigError, match=r"experts\.down of shape \(3, 4, 4\)"):
        match(adapter, {"experts.down": (3, 4, 4)})


def test_everything_wrong_is_said_at_once():
    adapter = several({"q": (1, 4, 6), "v": (1, 4, 6)}, bias=True)
    with pytest.raises(ConfigError) as error:
        match(adapter, {"q.weight": (5, 6), "v.weight": (4, 6)})
    wheres = [problem.where for problem in error.value.problems]
    assert wheres == ["q of adapter a", "v of adapter a", "q of adapter a"]
    assert "q.bias" in str(error.value) and "(5, 6)" in str(error.value)


def test_quantised_and_misshapen_tensors_and_nan():
    adapter = several({"q": (1, 4, 6)}, saved={"head.weight": torch.ones(3, 4)})
    with pytest.raises(ConfigError, match=r"\(3, 4\).*\(2, 4\).*Resize the base"):
        match(adapter, {"q.weight": (4, 6), "head.weight": (2, 4)})
    weights = match(adapter, {"q.weight": (4, 6), "head.weight": (3, 4)})
    adapter.load("q").a.mul_(100)
    delta = adapter.load("q").dense()[0]
    with pytest.raises(MergeError, match="int8"):
        weights.apply("q.weight", torch.zeros(4, 6, dtype=torch.int8))
    largest = torch.full((4, 6), 65504.0).copysign(delta).to(torch.float16)
    with pytest.raises(MergeError, match=r"range of torch\.float16"):
        weights.apply("q.weight", largest)
    adapter.load("q").a[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"q\.lora_A of model a"):
        weights.apply("q.weight", torch.zeros(4, 6))


def test_many_square_weights_do_not_ask_each_other():
    infos = {f"layer.q{i}": ModuleInfo("linear", 1, 8, 8, 2) for i in range(20_000)}
    infos["layer.q0"] = ModuleInfo("linear", 1, 8, 4, 2)
    adapter = LoraAdapter("a", {}, infos, lambda module: pytest.fail(module))
    started = time.process_time()
    sizes = {f"{name}.weight": (info.rows, info.columns) for name, info in infos.items()}
    touched = match(adapter, sizes)
    assert len(touched.weights) == len(infos)
    assert time.process_time() - started < 5  # 30 s when every one looks at all others
