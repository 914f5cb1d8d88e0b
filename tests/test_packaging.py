"""The wheel: what it brings, and what uninstalling it takes away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import mergekit_ext

ROOT = Path(__file__).resolve().parents[1]
NAMES = """
from mergekit import merge_methods
print(*(method.spec.name for method in merge_methods.registered_methods()))
"""


def run(*command: object, **env: str) -> str:
    # Without PYTHONPATH the checkout would not be found in the other environment.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--quiet", "--wheel-dir", folder, ROOT),
    )
    (built,) = folder.glob("*.whl")
    return built


def test_installed_from_a_wheel_and_uninstalled(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies of this environment, as a plain path: its .pth files are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert "nan_ties" not in run(python, "-c", NAMES).split()

    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    assert (site / "mergekit_ext_autoload.pth").exists()
    assert (site / "mergekit_ext" / "py.typed").exists()
    assert {"nan", "nan_ties", "lore"} <= set(run(python, "-c", NAMES).split())
    where = run(python, "-c", "import mergekit_ext; print(mergekit_ext.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "check" in run(tmp_path / "env" / "bin" / "mergekit-ext", "--help")

    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "mergekit-ext")
    assert not list(site.glob("*mergekit_ext*"))
    assert "nan_ties" not in run(python, "-c", NAMES).split()


def test_the_files_that_versions_are_tried_with_exist():
    text = (ROOT / ".ci/versions").read_text(encoding="utf-8")
    (words,) = re.findall(r"set -- --numprocesses 2 \\\n(.*?)\nfi", text, flags=re.DOTALL)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True
    )
    assert [path for path in done.stdout.split() if not (ROOT / path).exists()] == []


def test_one_version():
    """The release tag is compared with the package's."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.findall(r'^version = "(.*)"$', project, re.MULTILINE) == [mergekit_ext.__version__]
    assert citation["version"] == mergekit_ext.__version__
