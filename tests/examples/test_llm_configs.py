"""The YAML files for language models are valid; their models are not downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "examples/llm").glob("*.yml"))


def test_there_are_examples() -> None:
    assert {path.stem for path in CONFIGS} >= {"nan", "nan_ties", "lore", "lore_with_base"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_validates(path: Path) -> None:
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert len(config.models or []) >= 2
    assert path.stem.startswith(config.merge_method)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_method_is_registered(path: Path) -> None:
    from mergekit.merge_methods import get

    import mergekit_ext

    mergekit_ext.register()
    assert get(yaml.safe_load(path.read_text(encoding="utf-8"))["merge_method"])
