"""Names of one form: every tensor of every adapter acts, or the merge is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergekit_ext.errors import ConfigError, MergeWarning
from peft_merge import add_merged_adapter, load_adapter, merge_adapters
from peft_merge.cli import main
from tests.peft_merge import models

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
ENCODER = {**_SIZES, "num_attention_heads": 2}
FEW = pytest.mark.filterwarnings("ignore:.* share . of the .* modules")
Rename = Callable[[str], str]


def llava():
    vision = CLIPVisionConfig(**ENCODER, image_size=8, patch_size=4, projection_dim=8)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=63
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"type": "mrope", "mrope_section": [1, 1, 0]}
    vision = {"embed_dim": 16, "hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    vision["patch_size"] = 4
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_scaling": rope},
        vision_config=vision,
        **{f"{name}_token_id": 60 + i for i, name in enumerate(["vision_start", "vision_end"])},
        image_token_id=62,
        vision_token_id=63,
    )
    return Qwen2VLForConditionalGeneration(config)


def vit():
    return ViTForImageClassification(ViTConfig(**ENCODER, image_size=8, patch_size=4))


def old_llava(name):
    """As before transformers 4.52, and the vision tower as before 5."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    return name.replace("model.multi_modal_projector", "multi_modal_projector")


def old_qwen2_vl(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def old_vit(name):
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    name = name.replace("attention.q_proj", "attention.attention.query")
    return name.replace("attention.v_proj", "attention.attention.value")


def save(folder, model, seed, **options):
    torch.manual_seed(seed)
    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **options}
    get_peft_model(model, LoraConfig(init_lora_weights=False, **given)).save_pretrained(folder)
    return folder


def rename(folder, change, **config):
    """Store an adapter under other names (without PEFT's prefix), and change its configuration."""
    tensors = load_file(folder / TENSORS)
    renamed = {PREFIX + change(key.removeprefix(PREFIX)): value for key, value in tensors.items()}
    save_file(renamed, folder / TENSORS, {"format": "pt"})
    text = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**text, **config}))
    return folder


def require_same(found, expected):
    assert found.infos.keys() == expected.infos.keys()
    for module in expected.infos:
        assert torch.equal(found.load(module).dense(), expected.load(module).dense()), module


def require_loaded(model, folder):
    """PEFT finds a place for every tensor, and misses none."""
    loaded = peft.PeftModel.from_pretrained(model, folder)
    stored = load_file(folder / TENSORS)
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(state[key], value), key


VLMS = {
    "llava": (llava, old_llava, {"target_modules": r".*language_model.*(q_proj|v_proj)"}, {}),
    "llava, both towers": (llava, old_llava, {"target_modules": ["q_proj", "fc1", "linear_1"]}, {}),
    "qwen2_vl": (qwen2_vl, old_qwen2_vl, {}, {}),
    "qwen2_vl, both towers": (qwen2_vl, old_qwen2_vl, {"target_modules": ["q_proj", "qkv"]}, {}),
    "full names": (
        qwen2_vl,
        old_qwen2_vl,
        {"target_modules": r"model\.language_model\..*\.q_proj"},
        {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]},
    ),
    "vit": (vit, old_vit, {}, {"target_modules": ["query", "value"]}),
}


@pytest.mark.parametrize("old_first", [True, False])
@pytest.mark.parametrize("name", VLMS)
def test_adapters_from_before_and_after_a_renaming_are_merged(name, old_first, tmp_path):
    make, change, options, config = VLMS[name]
    folders = [save(tmp_path / f"t{i}", make(), i, **options) for i in range(3)]
    expected = merge_adapters(folders).adapter
    rename(folders[0 if old_first else 2], change, **config)
    found = merge_adapters(folders)
    require_same(found.adapter, expected)
    assert "are named as in" in " ".join(found.report["notes"])
    found.save(tmp_path / "out")
    require_loaded(make(), tmp_path / "out")


@FEW
def test_modules_of_an_older_form_without_a_partner_are_renamed_too(tmp_path):
    text = r".*language_model.*\.{}"
    old = save(tmp_path / "old", llava(), 1, target_modules=text.format("q_proj"))
    new = save(tmp_path / "new", llava(), 2, target_modules=text.format("up_proj"))
    rename(old, old_llava)
    found = merge_adapters([old, new])
    assert all(module.startswith("model.language_model.") for module in found.adapter.infos)
    found.save(tmp_path / "out")
    require_loaded(llava(), tmp_path / "out")


@pytest.mark.parametrize("name", VLMS)
def test_names_of_an_older_form_are_refused_where_no_class_is_known(name, tmp_path):
    make, change, options, config = VLMS[name]
    old, new = (save(tmp_path / name, make(), 1, **options) for name in ("old", "new"))
    rename(old, change, **config, auto_mapping=None)
    rename(new, str, auto_mapping=None)
    with pytest.raises(ConfigError, match=r"may mean \S+ beside those of.*config\.json"):
        merge_adapters([old, new])


@pytest.mark.parametrize("name", VLMS)
def test_without_a_class_one_renaming_between_adapters_of_one_base_is_taken(name, tmp_path):
    make, change, options, config = VLMS[name]
    named = {"auto_mapping": None, "base_model_name_or_path": "an/unknown-model"}
    old, new = (
        rename(save(tmp_path / seed, make(), int(seed), **options), str, **named) for seed in "12"
    )
    expected = merge_adapters([old, new]).adapter
    rename(old, change, **config)
    found = merge_adapters([old, new])
    require_same(found.adapter, expected)
    assert "1: modules are named as in 2" in " ".join(found.report["notes"])
    found.save(tmp_path / "out")
    require_loaded(make(), tmp_path / "out")
    rename(new, str, base_model_name_or_path="another/model")
    with pytest.raises(ConfigError, match="may mean"):
        merge_adapters([old, new])


def test_a_body_and_a_model_with_a_head_are_refused(tmp_path):
    tiny = dict(**ENCODER, vocab_size=32)
    body = save(tmp_path / "body", BertModel(BertConfig(**tiny)), 1, target_modules=["query"])
    model = BertForSequenceClassification(BertConfig(**tiny))
    head = save(tmp_path / "head", model, 2, target_modules=["query"])
    with pytest.raises(ConfigError, match=r"bert\.encoder\.\S+ of adapter head: found encoder\."):
        merge_adapters([body, head])


WRAPPERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled by layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "parallel": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "recomputed": lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "twice": lambda name: PREFIX + name,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["plain", "ia3", "modules_to_save"])
def test_wrappers_of_training_are_no_part_of_a_name(kind, wrapper, tmp_path):
    folders = [models.saved(models.KINDS[kind], tmp_path / f"t{i}", i) for i in range(2)]
    expected = merge_adapters(folders, modules_to_save="t1").adapter
    rename(folders[1], WRAPPERS[wrapper])
    found = merge_adapters(folders, modules_to_save="t1").adapter
    assert found.infos == expected.infos and found.saved.keys() == expected.saved.keys()
    for module in expected.infos:
        assert torch.equal(
            getattr(found.load(module), "a", found.load(module)),
            getattr(expected.load(module), "a", expected.load(module)),
        )
    for name, load in expected.saved.items():
        assert torch.equal(found.saved[name](), load())


def test_wrappers_outside_of_the_peft_model(tmp_path):
    expected = load_adapter(models.saved(models.KINDS["plain"], tmp_path / "given", 1))
    folder = tmp_path / "a"
    shutil.copytree(tmp_path / "given", folder)
    tensors = load_file(folder / TENSORS)
    for outer in ("module.", "_orig_mod.", "module._orig_mod."):
        save_file({outer + key: value for key, value in tensors.items()}, folder / TENSORS)
        require_same(load_adapter(folder), expected)
    twins = {**tensors, **{f"_orig_mod.{key}": value.clone() for key, value in tensors.items()}}
    save_file(twins, folder / TENSORS)
    with pytest.raises(ConfigError, match="one tensor of each name"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
        "model.layers.7.self_attn.o_proj.lora_A.weight",
        "_orig_mod.model.layers.0.mlp.weight",
    ],
)
def test_a_tensor_that_peft_would_not_load_is_refused(name, tmp_path):
    folder = models.saved(models.KINDS["plain"], tmp_path / "a", 1)
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, PREFIX + name: torch.ones(2, 2)}, folder / TENSORS)
    with pytest.raises(ConfigError):
        load_adapter(folder)


def test_experts_one_by_one_and_stacked_are_refused_with_both(tmp_path):
    config = MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1)
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    stacked = save(tmp_path / "stacked", MixtralForCausalLM(config), 1, target_parameters=experts)
    single = tmp_path / "single"
    shutil.copytree(stacked, single)
    shapes = {"A": (4, 16), "B": (24, 4)}
    each = f"{PREFIX}model.layers.0.block_sparse_moe.experts"
    tensors = {
        f"{each}.{expert}.w1.lora_{side}.weight": torch.ones(shape)
        for expert in range(2)
        for side, shape in shapes.items()
    }
    save_file(tensors, single / TENSORS)
    text = json.loads((single / CONFIG).read_text())
    changed = {**text, "target_parameters": None, "target_modules": ["w1"]}
    (single / CONFIG).write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"one by one in single \(model\.\S+experts\.0\.w1\)"):
        merge_adapters([stacked, single])


def test_few_shared_modules_and_other_bases_warn_on_every_path(tmp_path):
    kind = models.KINDS["plain"]
    a = models.saved(kind, tmp_path / "ta", 1)
    b = models.saved(kind, tmp_path / "tb", 2, target_modules=["up_proj", "v_proj", "gate_proj"])
    for folder in (a, b):
        rename(folder, str, base_model_name_or_path=f"org/{folder.name}")

    def said(run):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run()
        return " ".join(str(w.message) for w in found if issubclass(w.category, MergeWarning))

    c = models.saved(kind, tmp_path / "tc", 3, target_modules=["up_proj"])
    rename(c, str, base_model_name_or_path="org/ta")
    few, bases = "share 0 of the 2 modules", "different base models: org/ta (ta), org/tb (tb)"
    document = {"merge_method": "linear", "models": [{"model": str(f)} for f in (a, b, c)]}
    (tmp_path / "m.yml").write_text(json.dumps(document))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        checked = CliRunner().invoke(main, [str(tmp_path / "m.yml"), "--check"]).output
    size = {"target_size": 2.5}
    for text in (
        said(lambda: merge_adapters([a, b, c])),
        said(lambda: merge_adapters([a, b, c], "flexmerge", parameters=size)),
        checked,
    ):
        assert few in text and "different base models:" in text, text
    model = models.reloaded(kind, a)
    model.load_adapter(c, "c")
    live = said(lambda: add_merged_adapter(model, ["default", "c"], adapter_name="m"))
    assert few in live and bases not in live


def test_gpt2_takes_adapters_whose_fan_in_fan_out_differs(tmp_path):
    options = {"target_modules": ["c_attn", "c_proj"]}
    folders = [save(tmp_path / f"t{i}", models.gpt2(), i, **options) for i in range(2)]
    rename(folders[0], str, fan_in_fan_out=True)
    rename(folders[1], str, fan_in_fan_out=False)
    merge_adapters(folders).save(tmp_path / "out")
    inputs = torch.arange(3, 11)[None]

    def change(folder):
        torch.manual_seed(0)
        base = models.gpt2()
        before = {name: value.clone() for name, value in base.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
        assert torch.isfinite(merged(inputs).logits).all()
        return {name: value - before[name] for name, value in merged.state_dict().items()}

    one, other, mean = map(change, (*folders, tmp_path / "out"))
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2, rtol=1e-4, atol=1e-5)


TOWERS = {
    "qwen2_vl": (qwen2_vl, old_qwen2_vl, r".*visual.*qkv", r".*language_model.*q_proj"),
    "llava": (llava, old_llava, r".*vision_tower.*q_proj", r".*language_model.*q_proj"),
}


@FEW
@pytest.mark.parametrize("old", [0, 1], ids=["vision", "text"])
@pytest.mark.parametrize("name", TOWERS)
def test_the_class_decides_where_adapters_share_no_place(name, old, tmp_path):
    make, change, *targets = TOWERS[name]
    model = make()
    model.save_pretrained(tmp_path / "base")
    folders = [
        save(tmp_path / f"t{i}", make(), i, target_modules=target)
        for i, target in enumerate(targets)
    ]
    for folder in folders:
        rename(folder, str, base_model_name_or_path=str(tmp_path / "base"))
    expected = merge_adapters(folders).adapter
    rename(folders[old], change, target_modules=[targets[old].rpartition("*")[2]])
    found = merge_adapters(folders)
    require_same(found.adapter, expected)
    assert f"t{old}: modules are named as in" in " ".join(found.report["notes"])
    found.save(tmp_path / "out")
    require_loaded(make(), tmp_path / "out")


def test_an_adapter_without_a_module_of_the_class_of_another_is_refused(tmp_path):
    llava().save_pretrained(tmp_path / "base")
    one = save(tmp_path / "one", llava(), 1, target_modules=r".*vision_tower.*q_proj")
    other = save(tmp_path / "other", vit(), 2)
    rename(one, str, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"no module of LlavaForConditionalGeneration"):
        merge_adapters([one, other])


@FEW
def test_names_of_another_class_than_the_base_s_stay(tmp_path):
    """A body of a base with a head: one form in both adapters, though not that of config.json."""
    config = BertConfig(**ENCODER, vocab_size=32, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path / "base")
    folders = [
        save(tmp_path / name, BertModel(config), 1, target_modules=[name])
        for name in ("query", "value")
    ]
    for folder in folders:
        rename(folder, str, base_model_name_or_path=str(tmp_path / "base"))
    assert all(name.startswith("encoder.") for name in merge_adapters(folders).adapter.infos)
