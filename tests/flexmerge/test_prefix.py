"""Names of a bare base and of models that have a prefix."""

from __future__ import annotations

import pytest

from mergekit_ext.flexmerge.layout import Renaming, find_renaming, named_as
from mergekit_ext.io.headers import TensorHeader

BODY = [f"encoder.layer.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]


def prefixed(prefix, names):
    return [f"{prefix}.{name}" for name in names]


def test_a_bare_base():
    models = [[*prefixed("vit", BODY), "classifier.weight"], prefixed("vit", BODY)]
    assert find_renaming([*BODY, "pooler.dense.weight"], models) == Renaming("vit", True)


def test_bare_models():
    base = [*prefixed("bert", BODY), "cls.predictions.bias"]
    assert find_renaming(base, [BODY, [*BODY, "pooler.weight"]]) == Renaming("bert", False)


@pytest.mark.parametrize(
    ("base", "models"),
    [
        (BODY, [BODY, BODY]),
        (prefixed("vit", BODY), [prefixed("vit", BODY)] * 2),
        # One model of each kind: no prefix fits both.
        (BODY, [prefixed("vit", BODY), BODY]),
        (BODY, [prefixed("vit", BODY), prefixed("deit", BODY)]),
        # Which of the two would the base be?
        (BODY, [[*prefixed("text", BODY), *prefixed("vision", BODY)]] * 2),
        # Too few.
        (BODY, [prefixed("vit", BODY[:3])] * 2),
        (["weight"], [["a.weight", "b.weight"]] * 2),
        ([], [[]]),
        (BODY, []),
    ],
)
def test_no_prefix(base, models):
    assert find_renaming(base, models) is None


def test_headers_keep_the_names_they_are_stored_under():
    def headers(names):
        return {name: TensorHeader(name, "F32", (1,), 4) for name in names}

    base = named_as(headers(BODY), Renaming("vit", adds=True))
    assert list(base) == prefixed("vit", BODY)
    assert [header.name for header in base.values()] == BODY
