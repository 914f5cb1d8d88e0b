"""Every way in which mergekit comes to know the methods."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

WANTED = {"nan", "lore", "nan_ties", "nan_linear", "nan_dare_ties", "nan_lore"}
LIST = "print(*(m.spec.name for m in merge_methods.registered_methods()))"


def python(code, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_mergekit_is_enough():
    assert set(python(f"from mergekit import merge_methods; {LIST}").split()) >= WANTED


def test_switched_off_by_the_environment():
    code = f"from mergekit import merge_methods; {LIST}"
    names = set(python(code, MERGEKIT_EXT_AUTOLOAD="0").split())
    assert "ties" in names
    assert not names & WANTED


@pytest.mark.parametrize(
    "order",
    [
        "import mergekit_ext, mergekit.merge; mergekit_ext.register(); mergekit_ext.register()",
        "import mergekit_ext; mergekit_ext.register(); import mergekit.merge",
    ],
    ids=["after mergekit", "before mergekit"],
)
def test_register_does_the_same_explicitly(order):
    code = (
        f"{order}; from mergekit import merge_methods, plan, merge; {LIST}; "
        "print(plan.MergePlanner.__module__, merge.MergePlanner.__module__, "
        "hasattr(merge.run_merge, 'stock'), hasattr(merge.run_merge.stock, 'stock'))"
    )
    methods, host = python(code, MERGEKIT_EXT_AUTOLOAD="0").splitlines()
    assert set(methods.split()) >= WANTED
    assert host == "mergekit_ext.host.planner mergekit_ext.host.planner True False"


def test_a_process_without_mergekit_loads_nothing():
    code = (
        "import sys; loaded = [m for m in sys.modules if m.startswith('mergekit')]; print(*loaded)"
    )
    assert set(python(code).split()) == {"mergekit_ext", "mergekit_ext.autoload"}


@pytest.mark.parametrize("module", ["declared", "planner"])
def test_any_module_may_be_imported_first(module):
    python(f"import mergekit_ext.host.{module}")


def test_the_finder_leaves_when_its_work_is_done():
    code = (
        "import sys, mergekit.merge, mergekit.scripts.multimerge, "
        "mergekit.scripts.merge_raw_pytorch, mergekit.scripts.run_yaml; "
        "print([type(f).__module__ for f in sys.meta_path if 'mergekit' in type(f).__module__])"
    )
    assert python(code).strip() == "[]"


def test_looking_for_a_module_is_not_importing_it():
    code = (
        "from importlib.util import find_spec; find_spec('mergekit.merge_methods'); "
        f"find_spec('mergekit.plan'); from mergekit import merge_methods, plan; {LIST}; "
        "print(plan.MergePlanner.__module__)"
    )
    methods, planner = python(code).splitlines()
    assert set(methods.split()) >= WANTED
    assert planner == "mergekit_ext.host.planner"


def test_methods_of_others_get_their_nan_on_the_next_call():
    code = """
from mergekit import merge_methods
from mergekit.merge_methods import PerInput, TensorGroup, merge_method
import torch, mergekit_ext
@merge_method(name="theirs")
def theirs(group: TensorGroup, weight: PerInput[float]) -> torch.Tensor:
    return group.tensors[0]
merge_methods.register(theirs)
mergekit_ext.register()
print(merge_methods.get("nan_theirs").spec.pretty_name)
"""
    assert python(code).strip() == "theirs with NAN coefficients"


def test_an_entry_point_is_declared():
    (found,) = entry_points(group="mergekit.plugins", name="mergekit_ext")
    assert found.load().__name__ == "register"


@pytest.mark.parametrize("version", ["0.1.5", "0.1.6rc1", "0.1.12"])
def test_later_versions_of_the_series_are_welcome(version, monkeypatch):
    from mergekit_ext.host import patches

    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    patches.check_version()


@pytest.mark.parametrize("version", ["0.1.4", "0.2.0"])
def test_another_mergekit_is_refused(version, monkeypatch):
    from mergekit_ext.errors import HostVersionError
    from mergekit_ext.host import patches

    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    with pytest.raises(HostVersionError, match=rf"mergekit {version} is installed"):
        patches.check_version()
