"""What a module imports late is imported when it is used, and seen late by that module alone."""

from __future__ import annotations

import builtins
import importlib.util
import sys

import pytest

from mergekit_ext.late import late_imports

LIBRARY = "class Kind: pass\ndef double(x): return 2 * x\nfactor = 3\n"
USER = """
import late_library
from late_library import double
import late_neighbour
def use(x): return double(x) * late_library.factor
def of(kind: late_library.Kind): ...
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    for name in ("late_library", "late_neighbour", "late_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "late_library.py").write_text(LIBRARY)
    (tmp_path / "late_neighbour.py").write_text("import late_plain\n")
    (tmp_path / "late_plain.py").write_text("")
    (tmp_path / "late_user.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    yield execute
    for name in ("late_library", "late_neighbour", "late_plain"):
        sys.modules.pop(name, None)


def execute(late):
    spec = importlib.util.find_spec("late_user")
    module = importlib.util.module_from_spec(spec)
    stock = builtins.__import__
    with late_imports(module, late):
        spec.loader.exec_module(module)
    assert builtins.__import__ is stock
    return module


LATE = {"late_library": ("", "double", "Kind"), "late_plain": ("",)}


def test_a_late_import_happens_when_it_is_used(user):
    module = user(LATE)
    assert "late_library" not in sys.modules
    assert module.use(5) == 30 and "late_library" in sys.modules
    module.late_library.factor = 4  # as a test that replaces something does
    assert module.use(5) == 40 and sys.modules["late_library"].factor == 4


def test_other_modules_import_at_once(user):
    module = user(LATE)
    assert module.late_neighbour.late_plain is sys.modules["late_plain"]


def test_what_is_loaded_already_is_no_stand_in(user):
    import late_library

    assert user({"late_library": ("",)}).late_library is late_library


def test_it_can_be_switched_off(user, monkeypatch):
    monkeypatch.setenv("MERGEKIT_EXT_LATE_IMPORTS", "0")
    assert user(LATE).late_library is sys.modules["late_library"]
