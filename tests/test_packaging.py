"""The wheel: what it brings, README.md with it, and what uninstalling it takes away."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import mergekit_ext
from tests.flexmerge.handmade import vit
from tests.models import family, tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
NAMES = """
from mergekit import merge_methods
print(*(method.spec.name for method in merge_methods.registered_methods()))
"""


def run(*command: object, cwd: Path = Path("/"), **env: str) -> str:
    # Without PYTHONPATH the checkout would not be found in the other environment.
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, env=clean, cwd=cwd, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
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


def qwen() -> PreTrainedModel:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))


def readme_models(folder: Path) -> None:
    """Save small models under the names of README.md: a folder wins over a name on the Hub."""
    of_modules = {
        qwen: ["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-Coder-7B-Instruct"],
        vit: ["google/vit-base-patch16-224", "vit-flowers", "vit-birds", "vit-cars"],
    }
    for make, names in of_modules.items():
        base, tuned = family(folder / make.__name__, make)
        for name, saved in zip(names, [base, *tuned], strict=False):
            shutil.copytree(saved, folder / name)
    for name in of_modules[qwen]:
        tokenizer(folder / name)
    for name, source in zip(["base", "tuned"], of_modules[qwen], strict=False):
        shutil.copytree(folder / source, folder / name)
    for rank, name in enumerate(["lora-code", "lora-maths"], start=2):
        wanted = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(qwen(), wanted).save_pretrained(folder / name)


# What the Python of README.md takes as given.
GIVEN = """
from transformers import AutoModelForCausalLM
names = "Qwen2.5-7B", "Qwen2.5-7B-Instruct", "Qwen2.5-Coder-7B-Instruct"
base, code, maths = (AutoModelForCausalLM.from_pretrained(f"Qwen/{name}") for name in names)
"""
# And what comes of it.
MADE = """
assert {*models} == {"vit-flowers", "vit-birds", "vit-cars"}
assert type(model) is type(merged) is type(base)
from peft import PeftModel
for folder in "merged-lora", "lora":
    model = PeftModel.from_pretrained(model, folder, folder)
"""


def run_readme(bin: Path, folder: Path) -> None:
    """Run the blocks of README.md in order, and its Python last, as one program."""
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    program, path = [GIVEN], f"{bin}:/usr/bin:/bin"
    for language, text in blocks:
        if language == "python":
            program.append(text)
        elif language == "yaml":
            (folder / re.findall(r"\A# (\S+)\n", text)[0]).write_text(text)
        elif "pip install" not in text and "make " not in text:  # done; in .ci/run
            run("bash", "-ec", text, cwd=folder, PATH=path)
    run(bin / "python", "-c", "\n".join([*program, MADE]), cwd=folder)


def test_installed_from_a_wheel_it_does_what_the_readme_says_and_is_uninstalled(wheel, tmp_path):
    bin = tmp_path / "env" / "bin"
    venv.create(bin.parent)
    python = bin / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies of this environment, as a plain path: its .pth files are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    stock = Path(sysconfig.get_path("scripts"), "mergekit-yaml").read_text("utf-8")
    (bin / "mergekit-yaml").write_text(re.sub(r"\A.*", f"#!{python}", stock))
    (bin / "mergekit-yaml").chmod(0o755)

    run(*pip, "install", "--no-deps", "--no-compile", "--force-reinstall", wheel)
    assert (site / "mergekit_ext_autoload.pth").exists()
    assert (site / "mergekit_ext" / "py.typed").exists()
    where = run(python, "-c", "import mergekit_ext; print(mergekit_ext.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    readme_models(tmp_path)
    run_readme(bin, tmp_path)

    run(*pip, "uninstall", "--yes", "mergekit-ext")
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
