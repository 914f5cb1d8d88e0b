"""Every reader of weights refuses every file of the corpus, and takes the sound one."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from mergekit_ext.errors import FileError
from mergekit_ext.io.headers import read_safetensors
from tests.attacks.readers import WEIGHTS, file_of, own_up
from tests.attacks.weights import ATTACKS, NAMES, joined


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_sound_inputs_are_taken(name, inputs, answer):
    """Otherwise the other tests would pass for any reason."""
    outcome = answer(WEIGHTS[name][0], inputs)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_header_is_refused(attack, sound, tmp_path):
    """What every reader of the project relies on."""
    content = (sound / "base" / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(ATTACKS[attack](content))
    with pytest.raises(FileError) as raised:
        read_safetensors(file)
    assert len(str(raised.value)) < 1000


def test_metadata_may_be_null_as_for_the_library(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(joined({"__metadata__": None}, b""))
    assert not load_file(file) and not read_safetensors(file)


# Each reader meets some of the corpus, and each file several readers.
_PAIRS = [
    (reader, attack)
    for place, reader in enumerate(WEIGHTS)
    for number, attack in enumerate({**ATTACKS, **NAMES})
    if number % len(WEIGHTS) in (place, (place + 5) % len(WEIGHTS)) or attack in NAMES
]


@pytest.mark.parametrize(("name", "attack"), _PAIRS)
def test_every_reader_refuses(name, attack, inputs, refused):
    reader, pattern = WEIGHTS[name]
    file = file_of(inputs, pattern)
    file.write_bytes({**ATTACKS, **NAMES}[attack](file.read_bytes()))
    own_up(inputs, file)
    refused(reader, inputs)
