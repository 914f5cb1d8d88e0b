"""JSON and YAML of any kind: one error for each, from every reader."""

from __future__ import annotations

import json

import pytest

from mergekit_ext.errors import FileError
from mergekit_ext.io.documents import read
from tests.attacks import texts
from tests.attacks.readers import JSON, command, file_of

# One for each function that reads.
_READERS = (
    *("config.json, check", "index, flexmerge", "adapter_config.json, peft-merge"),
    *("manifest, export", "manifest, load_tasks"),
)


@pytest.mark.parametrize("text", texts.JSON)
@pytest.mark.parametrize("name", _READERS)
def test_json(name, text, inputs, refused):
    reader, pattern = JSON[name]
    file_of(inputs, pattern).write_bytes(texts.JSON[text])
    refused(reader, inputs)


_COMMANDS = {
    "mergekit-ext check": lambda file, out: ("mergekit-ext", "check", file),
    "mergekit-ext merge": lambda file, out: ("mergekit-ext", "merge", file, out),
    "mergekit-ext analyze": lambda file, out: ("mergekit-ext", "analyze", file, out),
    "mergekit-ext sizes": lambda file, out: ("mergekit-ext", "sizes", file, out),
    "mergekit-yaml": lambda file, out: ("mergekit-yaml", file, out),
    "peft-merge": lambda file, out: ("peft-merge", file, out),
}
# Sound documents of mergekit's own methods, whose models are mergekit's business.
_FOR_MERGEKIT = ("a model with NUL", "half a surrogate", "a weight that is not finite")

# Commands parse alike: each meets a fifth of the corpus, and one of each package all of it.
# What takes seconds takes as long in every command.
_SLOW = "a million values"
_PAIRS = [
    (name, text)
    for place, name in enumerate(_COMMANDS)
    for number, text in enumerate(texts.YAML)
    if name == "mergekit-ext check"
    or (name == "peft-merge" and text != _SLOW)
    or (number % 5 == place and text not in (*_FOR_MERGEKIT, _SLOW))
]


@pytest.mark.parametrize(("name", "text"), _PAIRS)
def test_yaml(name, text, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "merge.yml"
    file.write_bytes(texts.YAML[text])
    refused(lambda inputs, out: command(*_COMMANDS[name](file, out)), tmp_path / "work")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000_000_000_000_000_000", 10**18),
        ("0b" + "1" * 64, 2**64 - 1),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", None),
        ("-99999999999999999999", None),
    ],
)
def test_whole_numbers_have_64_bits(text, value):
    if value is None:
        with pytest.raises(FileError, match="64 bits at most"):
            read(f"seed: {text}")
    else:
        assert read(f"seed: {text}") == ([{"seed": value}], [])


def test_a_key_given_twice_has_its_path():
    (problem,) = read("models:\n- a: 1\n- model: x\n  model: y\n")[1]
    assert (problem.where, problem.found) == ("models[1].model", "the key twice, on lines 3 and 4")


@pytest.mark.parametrize("text", texts.MANY)
@pytest.mark.parametrize("name", ["mergekit-ext check", "mergekit-ext merge", "peft-merge"])
def test_thousands_of_problems(name, text, tmp_path, answer):
    file = tmp_path / "merge.yml"
    file.write_bytes(texts.MANY[text])
    outcome = answer(lambda inputs, out: command(*_COMMANDS[name](file, out)), tmp_path / "work")
    assert outcome.code == 2
    assert " more\n" in outcome.text
    assert len(outcome.text.splitlines()) < 105


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 1_001}, "num_hidden_layers"),
        ({"num_hidden_layers": 1_000, "num_local_experts": 101}, "101 experts"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "config.json"),
        ({"num_hidden_layers": None}, "config.json"),
        ({"num_local_experts": 10**9, "model_type": "mixtral"}, "num_local_experts"),
        ({"text_config": {"num_hidden_layers": 10**15}}, "num_hidden_layers"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [{}]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": True}, "architectures"),
        ({"model_type": ["llama"]}, "config.json"),
        ({"model_type": {"a": 1}}, "config.json"),
        ({"model_type": "../../llama"}, "config.json"),
        ({"hidden_size": "8"}, "config.json"),
    ],
    ids=str,
)
@pytest.mark.parametrize("reader", ["config.json, check", "config.json, flexmerge"])
def test_hostile_configurations(value, said, reader, inputs, refused):
    read, pattern = JSON[reader]
    file = inputs / pattern
    file.write_text(json.dumps({**json.loads(file.read_text()), **value}))
    assert said in refused(read, inputs)


@pytest.mark.parametrize("reader", [name for name in JSON if name.startswith("config.json")])
@pytest.mark.parametrize("kind", ["llama", "mine"])
def test_code_of_a_model_is_not_run(kind, reader, inputs, answer):
    read, pattern = JSON[reader]
    file = inputs / pattern
    owned = inputs.parent / "owned"
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    content = {**json.loads(file.read_text()), "model_type": kind, "auto_map": own}
    file.write_text(json.dumps({**content, "trust_remote_code": True}))
    (file.parent / "evil.py").write_text(f"import pathlib; pathlib.Path({str(owned)!r}).touch()")
    assert answer(read, inputs).code == (0 if kind == "llama" else 2)
    assert not owned.exists()
