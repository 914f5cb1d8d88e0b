"""Adapters that cannot be used: one error with everything that is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_ext.errors import ConfigError, NonFiniteError
from peft_merge.io.read import load_adapter
from peft_merge.io.unsupported import KNOWN
from tests.peft_merge.edit import Q, change_config, change_tensors
from tests.peft_merge.models import KINDS, reloaded, saved


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"r": 0}, "r"),
        ({"r": "4"}, "r"),
        ({"r": True}, "r"),
        ({"r": 4.0}, "r"),
        ({"r": 2**63}, "r"),
        ({"lora_alpha": 10**309}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"layers_pattern": ["("]}, "layers_pattern"),
        ({"modules_to_save": "classifier"}, "modules_to_save"),
        ({"bias": "some"}, "bias"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication[0]"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_named(fields, where, adapter_folder):
    with pytest.raises(ConfigError) as raised:
        load_adapter(change_config(adapter_folder("plain"), **fields))
    assert [problem.where.rpartition(": ")[2] for problem in raised.value.problems] == [where]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ["zzz"]}, 4),
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, 2),
        ({"exclude_modules": ["v_proj"]}, 2),
        ({"layers_to_transform": [0]}, 2),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, 2),
        ({"layers_to_transform": 1, "layers_pattern": ["h", "blocks"]}, 4),
    ],
    ids=str,
)
def test_tensors_that_peft_would_not_load_are_refused(fields, count, adapter_folder):
    folder = change_config(adapter_folder("plain"), **fields)
    with pytest.raises(ConfigError) as raised:
        load_adapter(folder)
    (problem,) = raised.value.problems
    assert "PEFT would not load" in problem.found
    assert ("and 2 more" in problem.found) == (count == 4)
    try:
        model = reloaded(KINDS["plain"], folder)
    except ValueError as error:
        assert "not found" in str(error) or "No modules were targeted" in str(error)
    else:
        read = [name for name in model.state_dict() if "lora_A" in name]
        assert len(read) == 4 - count


def test_a_rank_that_the_tensors_do_not_have_is_refused(adapter_folder):
    with pytest.raises(ConfigError, match="linear factors of rank 8") as raised:
        load_adapter(change_config(adapter_folder("plain"), r=8))
    assert len(raised.value.problems) == 4  # each module, all at once


def test_missing_and_further_tensors_are_listed_together(adapter_folder):
    def change(tensors):
        del tensors[f"{Q}.lora_B.weight"]
        tensors["base_model.model.model.norm.mystery"] = torch.ones(2)
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)

    with pytest.raises(ConfigError) as raised:
        load_adapter(change_tensors(adapter_folder("plain"), change))
    text = str(raised.value)
    assert len(raised.value.problems) == 3
    assert "no lora_B.weight" in text and "mystery" in text and "base_model.model." in text


def _integer_factors(tensors):
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].to(torch.int8)


def _with(name, *shape):
    return lambda tensors: tensors.update({name: torch.ones(*shape)})


_QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
_SEPARATORS = ("base_model.model.../x", "base_model.model.a\\b.lora_A.weight", "a\nb")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("plain", _with(f"{Q}.lora_B.bias", 16), "no place"),
        ("lora_bias", _with(f"{_QUERY}.lora_B.bias", 3), r"shape \[16\]"),
        ("plain", _integer_factors, "dtype I8"),
        ("plain", lambda tensors: tensors.clear(), "no factors"),
        *(("plain", _with(name, 2, 2), "without slashes") for name in _SEPARATORS),
    ],
)
def test_tensors_that_do_not_belong_to_an_adapter_are_refused(kind, change, reason, adapter_folder):
    with pytest.raises(ConfigError, match=reason):
        load_adapter(change_tensors(adapter_folder(kind), change))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(file, adapter_folder):
    folder = adapter_folder("plain")
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"no {file}"):
        load_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_what_is_not_finite_stops_with_tensor_and_adapter(part, value, adapter_folder):
    folder = change_tensors(
        adapter_folder("plain"), lambda t: t[f"{Q}.{part}"].view(-1)[3:5].fill_(value)
    )
    adapter = load_adapter(folder, name="mine")
    adapter.load("model.layers.1.self_attn.q_proj")
    with pytest.raises(NonFiniteError, match=f"{Q}.{part} of model mine: found 2 non-finite"):
        adapter.load("model.layers.0.self_attn.q_proj")


def test_whole_tensors_and_vectors_are_checked_for_nan_as_well(adapter_folder):
    folder = adapter_folder("ia3_modules_to_save")
    change_tensors(folder, lambda t: [v.view(-1)[:1].fill_(float("nan")) for v in t.values()])
    adapter = load_adapter(folder)
    with pytest.raises(NonFiniteError):
        adapter.saved["classifier.weight"]()
    with pytest.raises(NonFiniteError):
        adapter.load(next(iter(adapter.infos)))


@pytest.mark.parametrize(
    ("feedforward", "accepted"),
    [
        (["down_proj"], True),
        (r".*\.down_proj", True),
        (None, True),
        ([], False),
        (["down_proj", "k_proj"], False),
    ],
)
def test_feedforward_modules_must_fit_the_shapes(feedforward, accepted, adapter_folder):
    folder = change_config(adapter_folder("ia3"), feedforward_modules=feedforward)
    if accepted:
        adapter = load_adapter(folder)
        assert {n for n, info in adapter.infos.items() if info.feedforward} == {
            f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
        }
    else:
        with pytest.raises(ConfigError, match="feedforward_modules"):
            load_adapter(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", ["plain", "ia3", "nested_parameters", "modules_to_save"])
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_whatever_stands_in_a_field_gives_an_adapter_or_one_error(kind, data, tmp_path):
    folder = tmp_path / kind
    if not folder.exists():
        saved(KINDS[kind], folder, seed=1)
    changes = data.draw(
        st.dictionaries(
            st.sampled_from(sorted(KNOWN["LORA"] | KNOWN["IA3"])), JSON, min_size=1, max_size=2
        )
    )
    original = (folder / "adapter_config.json").read_text()
    try:
        load_adapter(change_config(folder, **changes))
    except ConfigError as error:
        assert error.problems
    finally:
        (folder / "adapter_config.json").write_text(original)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_whatever_bytes_a_file_has_it_gives_an_adapter_or_one_error(data, tmp_path):
    folder = tmp_path / "plain"
    if not folder.exists():
        saved(KINDS["plain"], folder, seed=1)
    file = folder / "adapter_model.safetensors"
    original = file.read_bytes()
    place = data.draw(st.integers(0, 600))
    change = data.draw(st.binary(min_size=1, max_size=4))
    try:
        file.write_bytes(original[:place] + change + original[place + len(change) :])
        load_adapter(folder)
    except ConfigError as error:
        assert error.problems
    finally:
        file.write_bytes(original)


def test_a_configuration_that_is_no_json_is_named_once(adapter_folder):
    file = adapter_folder("plain") / "adapter_config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON") as raised:
        load_adapter(file.parent)
    (problem,) = raised.value.problems
    assert str(problem).count(str(file)) == 1


def test_a_list_of_the_wrong_length(adapter_folder):
    folder = change_config(adapter_folder("plain"), layer_replication=[[1]])
    with pytest.raises(ConfigError, match=r"found \[1\]; expected at least 2 items\."):
        load_adapter(folder)
