"""A folder, a pipe or a device in the place of a file is refused, without waiting for it."""

from __future__ import annotations

import itertools
import os
import socket

import pytest

from tests.attacks.places import PLACES
from tests.attacks.readers import JSON, WEIGHTS, check_nan, file_of, merge_nan

# Of readers that open a file in the same way one stands for all.
_READERS = {
    "weights, check": WEIGHTS["mergekit-ext check"],
    "weights, flexmerge": WEIGHTS["flexmerge"],
    "adapter's weights": WEIGHTS["load_adapter"],
    "shard": WEIGHTS["flexmerge.load"],
    "adapter's weights, load_tasks": WEIGHTS["load_tasks"],
    "config.json": JSON["config.json, check"],
    "index": JSON["index, flexmerge"],
    "adapter_config.json": JSON["adapter_config.json, peft-merge"],
    "manifest": JSON["manifest, export"],
    "adapters' manifest": JSON["manifest, load_tasks"],
}


@pytest.mark.parametrize(("name", "place"), list(itertools.product(_READERS, PLACES)))
def test_what_is_no_file(name, place, inputs, refused):
    if name == "index" and place in ("a link to itself", "a broken link"):
        pytest.skip("no index, so that model.safetensors is read")
    reader, pattern = _READERS[name]
    file = file_of(inputs, pattern)
    file.unlink(missing_ok=True)
    PLACES[place](file)
    refused(reader, inputs)


def test_a_socket(inputs, refused, monkeypatch):
    file = inputs / "tuned1" / "model.safetensors"
    file.unlink()
    monkeypatch.chdir(file.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(file.name)
        refused(check_nan, inputs)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", _READERS)
def test_what_may_not_be_read(name, inputs, refused):
    reader, pattern = _READERS[name]
    file = file_of(inputs, pattern)
    file.touch()
    file.chmod(0)
    refused(reader, inputs)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("reader", [merge_nan], ids=["nan_ties"])
def test_pipes_beside_the_weights_are_left_alone(name, reader, inputs, answer):
    os.mkfifo(inputs / "base" / name)
    answer(reader, inputs)


def test_a_folder_whose_name_is_no_utf_8(inputs, refused):
    """Neither YAML nor JSON can name it; a command in such a folder prints no traceback."""
    os.rename(inputs / "tuned1", os.fsencode(inputs) + b"/\xff\xfe")  # noqa: PTH104
    refused(check_nan, inputs)
