"""Every way in which mergekit comes to know the methods. A process that loads it takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from mergekit_ext.errors import HostVersionError
from mergekit_ext.host import patches

WANTED = {"nan", "lore", "nan_ties", "nan_linear", "nan_dare_ties", "nan_lore"}
LIST = "print(*(m.spec.name for m in merge_methods.registered_methods()))"


def python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_mergekit_is_enough():
    """Looking for a module is not importing it; the finder leaves when its work is done; methods
    of others get their `nan_<method>` on the next call."""
    code = f"""
from importlib.util import find_spec
find_spec("mergekit.merge_methods"), find_spec("mergekit.plan")
from mergekit import merge_methods
{LIST}
import sys, torch, mergekit.merge, mergekit.plan
print(mergekit.plan.MergePlanner.__module__)
import mergekit.scripts.multimerge, mergekit.scripts.merge_raw_pytorch, mergekit.scripts.run_yaml
import mergekit.architecture.auto
print([type(f).__module__ for f in sys.meta_path if "mergekit" in type(f).__module__])
from mergekit.merge_methods import PerInput, TensorGroup, merge_method
import mergekit_ext
def theirs(group: TensorGroup, weight: PerInput[float]) -> torch.Tensor:
    return group.tensors[0]
merge_methods.register(merge_method(name="theirs")(theirs))
mergekit_ext.register()
print(merge_methods.get("nan_theirs").spec.pretty_name)
"""
    methods, *rest = python(code)
    assert set(methods.split()) >= WANTED
    assert rest == ["mergekit_ext.host.planner", "[]", "theirs with NAN coefficients"]


HOST = (
    f"{LIST}; print(plan.MergePlanner.__module__, merge.MergePlanner.__module__, "
    "hasattr(merge.run_merge, 'stock'), hasattr(merge.run_merge.stock, 'stock'))"
)


def test_without_autoload_nothing_is_changed_until_it_is_asked_for():
    code = f"""
import mergekit_ext
from mergekit import merge_methods, plan, merge
{LIST}
mergekit_ext.register(); mergekit_ext.register()
{HOST}
"""
    before, methods, host = python(code, MERGEKIT_EXT_AUTOLOAD="0")
    assert "ties" in before.split() and not set(before.split()) & WANTED
    assert set(methods.split()) >= WANTED
    assert host == "mergekit_ext.host.planner mergekit_ext.host.planner True False"


def test_register_before_mergekit():
    code = f"""
import mergekit_ext; mergekit_ext.register()
from mergekit import merge_methods, plan, merge
{HOST}
"""
    methods, host = python(code, MERGEKIT_EXT_AUTOLOAD="0")
    assert set(methods.split()) >= WANTED
    assert host == "mergekit_ext.host.planner mergekit_ext.host.planner True False"


def test_a_process_without_mergekit_loads_nothing():
    code = (
        "import sys; loaded = [m for m in sys.modules if m.startswith('mergekit')]; print(*loaded)"
    )
    assert set(python(code)[0].split()) == {"mergekit_ext", "mergekit_ext.autoload"}


def test_any_module_may_be_imported_first():
    python("import mergekit_ext.host.planner")


def test_an_entry_point_is_declared():
    (found,) = entry_points(group="mergekit.plugins", name="mergekit_ext")
    assert found.load().__name__ == "register"


@pytest.mark.parametrize("version", ["0.1.5", "0.1.6rc1", "0.1.12"])
def test_later_versions_of_the_series_are_welcome(version, monkeypatch):
    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    patches.check_version()


@pytest.mark.parametrize("version", ["0.1.4", "0.2.0"])
def test_another_mergekit_is_refused(version, monkeypatch):
    monkeypatch.setattr(patches.metadata, "version", lambda name: version)
    with pytest.raises(HostVersionError, match=rf"mergekit {version} is installed"):
        patches.check_version()
