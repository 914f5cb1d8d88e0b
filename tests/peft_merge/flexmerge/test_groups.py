"""Which tasks share what, and what they share, against a search over dense changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ext.errors import ConfigError, MergeError, NonFiniteError
from mergekit_ext.events import MergeCallback
from peft_merge.flexmerge import method
from peft_merge.io.read import load_adapter
from peft_merge.io.write import state_dict
from peft_merge.merge import merge_adapters
from tests.peft_merge.loras import adapter, update
from tests.peft_merge.models import KINDS, cast, saved
from tests.reference import adapters_flexmerge as reference

NAMES = ["layers.0.a", "layers.0.b", "layers.1.a"]


def flex(adapters, target, **options):
    rank = options.pop("rank", None)
    patterns = options.pop("patterns", None if rank is None else True)
    each = {
        k: options.pop(k)
        for k in ("weights", "seed", "space", "dtype", "callbacks")
        if k in options
    }
    parameters = {"target_size": target, **options}
    return merge_adapters(
        adapters, "flexmerge", parameters=parameters, rank=rank, patterns=patterns, **each
    )


def plain(count, rank, **options):
    """Adapters of which no two are alike."""
    return [
        adapter(f"t{i}", {m: update(i * 7 + j, rank, **options) for j, m in enumerate(NAMES)})
        for i in range(count)
    ]


def groups_of(result):
    position = {item["name"]: i for i, item in enumerate(result.report["adapters"])}
    return [
        sorted(tuple(position[task] for task in group["tasks"]) for group in block["groups"])
        for block in result.report["blocks"]
    ]


def distinct_bytes(result):
    """Of all factors in memory, what is shared once."""
    seen = {}
    for one in result.adapters:
        for module in one.infos:
            value = one.load(module)
            for part in (value.a, value.b, value.bias):
                if part is not None:
                    seen[part.data_ptr()] = part.nbytes
    return sum(seen.values())


def some(count, seed, ranks, *, bias=False, shape=(1, 8, 6)):
    """Adapters of which some are alike, and some lack a module."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        updates = {}
        for j, module in enumerate(NAMES):
            if float(torch.rand((), generator=generator)) < 0.2 and i:
                continue
            updates[module] = update(
                seed * 100 + i * 10 + j, ranks[i % len(ranks)], shape, bias=bias, scale=0.3 + i
            )
        found.append(adapter(f"task{i}", updates or {NAMES[0]: update(seed, 2, shape)}))
    return found


@pytest.mark.filterwarnings("ignore:.* share 0 of the 1 modules")
@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(2, 4),
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
    share=st.floats(0, 1),
    layers=st.booleans(),
    one_rank=st.booleans(),
)
def test_groups_are_those_of_a_search_over_all_pairs(
    count, seed, ranks, bias, share, layers, one_rank
):
    adapters = some(count, seed, ranks, bias=bias)
    have = {m for a in adapters for m in a.infos}
    blocks = [[m] for m in NAMES if m in have]
    if layers:
        blocks = [[m for m in NAMES if m in have and f".{i}." in m] for i in range(2)]
        blocks = [block for block in blocks if block]
    whole = [tuple(range(count))]
    everything = sum(reference.stored(adapters, whole[0], b, one_rank) for b in blocks)
    apart = sum(reference.stored(adapters, (i,), b, one_rank) for b in blocks for i in range(count))
    least = everything / apart * count
    target = least + share * (count - least)
    expected, size = reference.groups_at(adapters, blocks, target, one_rank)
    granularity = "layer" if layers else "module"
    found = flex(adapters, target, granularity=granularity, patterns=not one_rank)
    assert found.report["size"]["bytes"] == distinct_bytes(found)
    assert groups_of(found) == expected
    assert found.report["size"]["adapters"] == pytest.approx(size, rel=1e-12)
    for of_block, modules in zip(expected, blocks, strict=True):
        for group in of_block:
            for module in modules:
                own = [i for i in group if module in adapters[i].infos]
                if not own:
                    assert all(module not in found.adapters[i].infos for i in group)
                    continue
                values = [found.adapters[i].load(module) for i in group]
                if len(group) == 1:
                    given = adapters[own[0]].load(module)
                    assert torch.equal(values[0].a[:, : given.a.shape[1]], given.a)
                    torch.testing.assert_close(
                        values[0].dense(), given.dense(), rtol=1e-5, atol=1e-6
                    )
                    continue
                assert len({value.a.data_ptr() for value in values}) == 1
                wanted = reference.shared_change(adapters, group, module, one_rank)
                error = float((values[0].dense() - wanted).norm())
                assert error <= 1e-5 * max(1e-12, float(wanted.norm()))


@pytest.mark.parametrize("target", [4.0, 3.2, 2.5, 1.7, 1.0])
def test_the_size_that_is_reported_is_that_of_the_tensors(target):
    adapters = plain(4, 3)
    found = flex(adapters, target)
    assert found.report["size"]["bytes"] == distinct_bytes(found)
    assert found.report["size"]["adapters"] <= target
    assert found.report["size"]["unit_bytes"] * 4 == distinct_bytes(flex(adapters, 4))


def test_a_budget_in_bytes_is_kept():
    adapters = plain(4, 3)
    apart = distinct_bytes(flex(adapters, 4))
    for budget in (apart // 2, apart - 1, apart, 10 * apart):
        assert distinct_bytes(flex(adapters, f"{budget}B")) <= budget
    assert distinct_bytes(flex(adapters, f"{apart - 1}B")) < apart


@pytest.mark.parametrize("target", [3.0, 2.0])
@pytest.mark.parametrize(
    "kind", ["patterns", "rslora_patterns", "lora_bias", "convolutions", "ia3"]
)
def test_what_is_kept_apart_is_not_changed(kind, target, tmp_path):
    sources = [load_adapter(saved(KINDS[kind], tmp_path / f"t{i}", i)) for i in range(3)]
    found = flex(sources, target)
    found.save(tmp_path / "out")
    shared = {
        (task, module)
        for block in found.report["blocks"]
        for group in block["groups"]
        for task in group["tasks"]
        for module in group["modules"]
        if len(group["tasks"]) > 1
    }
    assert bool(shared) == (target < 3)
    for source in sources:
        again = load_adapter(tmp_path / "out" / source.name)
        if kind == "ia3" and not shared:
            assert again.config == source.config
        own, stored = state_dict(source), state_dict(again)
        assert own.keys() == stored.keys()
        if kind != "ia3":
            assert again.config["r"] == again.config["lora_alpha"]
            assert not again.config["rank_pattern"] and not again.config["use_rslora"]
        for module in source.infos:
            if (source.name, module) in shared:
                continue
            if kind == "ia3":
                assert torch.equal(source.load(module), again.load(module))
                continue
            given, kept = source.load(module), again.load(module)
            rank = given.a.shape[1]
            assert torch.equal(kept.a[:, :rank], given.a) and not kept.a[:, rank:].any()
            torch.testing.assert_close(kept.dense(), given.dense(), rtol=1e-5, atol=1e-6)
            if given.bias is not None:
                torch.testing.assert_close(kept.bias, given.scale * given.bias)


@pytest.mark.parametrize("algorithm", ["linear", "nan", "ties", "lore", "tsv_m", "dare_linear"])
def test_at_size_1_everybody_has_the_merge_of_all(algorithm):
    adapters = plain(3, 3)
    options = {"lore": {"mu_relative": 0.1}, "dare_linear": {"density": 0.5}}.get(algorithm, {})
    expected = merge_adapters(
        adapters, algorithm, parameters=options, rank=3, weights=[1.0, 2.0, 0.5], seed=4
    ).adapter
    found = flex(adapters, 1, algorithm=algorithm, weights=[1.0, 2.0, 0.5], seed=4, **options)
    for one in found.adapters:
        for module in NAMES:
            assert torch.equal(one.load(module).dense(), expected.load(module).dense())


@pytest.mark.parametrize("space", ["additive", "log"])
def test_ia3_shares_vectors_around_1(space, tmp_path):
    folders = [saved(KINDS["ia3"], tmp_path / f"t{i}", i) for i in range(3)]
    sources = [load_adapter(folder) for folder in folders]
    if space == "log":
        for source, folder in zip(sources, folders, strict=True):
            positive = {m: source.load(m).abs() + 0.05 for m in source.infos}
            object.__setattr__(source, "load", positive.__getitem__)
            assert folder.exists()
    found = flex(sources, 1, space=space, algorithm="linear")
    for module in sources[0].infos:
        rows = torch.stack([source.load(module).double() for source in sources])
        mean = rows.mean(0) if space == "additive" else rows.log().mean(0).exp()
        for one in found.adapters:
            assert torch.allclose(one.load(module).double(), mean, rtol=1e-6, atol=1e-7)


def test_ia3_of_different_modules(tmp_path):
    wide = saved(KINDS["ia3"], tmp_path / "wide", 1)
    narrow = saved(KINDS["ia3_attention"], tmp_path / "narrow", 2)
    found = flex([wide, narrow], 1.4286, algorithm="linear")
    given = load_adapter(wide)
    (down,) = [m for m in given.infos if "layers.0.mlp" in m]
    groups = next(b["groups"] for b in found.report["blocks"] if b["name"] == down)
    if len(groups) == 1:
        value = found.adapters[1].load(down).double()
        assert torch.allclose(value, 1 + (given.load(down).double() - 1) / 2, atol=1e-6)
    found.save(tmp_path / "out")


def test_alike_adapters_share_first_and_lose_nothing():
    one = {m: update(j, 3) for j, m in enumerate(NAMES)}
    other = {m: update(50 + j, 3) for j, m in enumerate(NAMES)}
    adapters = [adapter("task-a", one), adapter("task-b", other), adapter("task-c", one)]
    found = flex(adapters, 2, algorithm="linear")
    assert groups_of(found) == [[(0, 2), (1,)]] * 3
    for module in NAMES:
        for new, old in zip(found.adapters, adapters, strict=True):
            assert torch.allclose(new.load(module).dense(), old.load(module).dense(), atol=1e-5)


def test_rank_of_what_is_shared():
    adapters = plain(3, 2)
    small = flex(adapters, 0.5, rank=1)
    assert {one.infos[NAMES[0]].rank for one in small.adapters} == {1}
    assert small.report["size"]["adapters"] == 0.5
    whole = flex(adapters, 3, rank="lossless")
    assert distinct_bytes(whole) == whole.report["size"]["bytes"]
    with pytest.raises(ConfigError, match="target_size"):
        flex(adapters, 2, rank="lossless")
    alike = [adapter(f"t{i}", {m: update(j, 2) for j, m in enumerate(NAMES)}) for i in range(3)]
    same = flex(alike, 1, rank="lossless", algorithm="linear")
    assert same.report["size"]["bytes"] == distinct_bytes(same)
    energy = flex(adapters, 2.5, rank={"energy": 0.4})
    assert energy.report["size"]["bytes"] == distinct_bytes(energy)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_huge_and_tiny_changes(scale):
    assert groups_of(flex(plain(3, 2, scale=scale), 2)) == groups_of(flex(plain(3, 2), 2))


def test_changes_beyond_all_bounds_are_an_error():
    adapters = [adapter(f"t{i}", {"m": update(i, 2, scale=1e200)}) for i in range(2)]
    with pytest.raises(MergeError, match="m: the changes are so large"):
        flex(adapters, 1)


def test_the_order_of_the_adapters_does_not_matter():
    adapters = some(4, 3, [1, 2, 3])
    turned = adapters[::-1]
    first, second = flex(adapters, 2.2), flex(turned, 2.2)
    names = [
        [
            sorted(sorted(group["tasks"]) for group in block["groups"])
            for block in result.report["blocks"]
        ]
        for result in (first, second)
    ]
    assert names[0] == names[1]
    for one, same in zip(first.adapters, second.adapters[::-1], strict=True):
        for module in one.infos:
            left, right = one.load(module).dense(), same.load(module).dense()
            assert torch.allclose(left, right, atol=1e-5)


def test_one_adapter_comes_back():
    source = adapter("only", {m: update(j, 2) for j, m in enumerate(NAMES)})
    (found,) = flex([source], 1).adapters
    for module in NAMES:
        assert torch.equal(found.load(module).a, source.load(module).a)
        assert torch.equal(found.load(module).dense(), source.load(module).dense())


def test_orders_of_the_ablation_are_taken():
    adapters = plain(3, 2)
    left = flex(adapters, 2.4, order="left_to_right")
    right = flex(adapters, 2.4, order="right_to_left")
    assert [len(found) for found in groups_of(left)] == [1, 3, 3]
    assert [len(found) for found in groups_of(right)] == [3, 3, 1]
    shuffled = {str(groups_of(flex(adapters, 2, order="random", seed=s))) for s in range(6)}
    assert len(shuffled) > 1


def test_zero_changes_and_rank_1_and_one_element():
    nothing = {m: update(1, 1, (1, 1, 1), size=0) for m in NAMES}
    something = {m: update(2, 1, (1, 1, 1)) for m in NAMES}
    adapters = [
        adapter("task-a", nothing),
        adapter("task-b", something),
        adapter("task-c", nothing),
    ]
    assert groups_of(flex(adapters, 2)) == [[(0, 2), (1,)]] * 3


def test_bf16_stays_bf16(tmp_path):
    folders = [saved(KINDS["plain"], tmp_path / f"t{i}", i) for i in range(2)]
    for folder in folders:
        cast(folder, torch.bfloat16)
    found = flex(folders, 1)
    found.save(tmp_path / "out")
    assert {i.dtype for a in found.adapters for i in a.infos.values()} == {torch.bfloat16}
    forced = flex(folders, 2, dtype="float32")
    assert {i.dtype for a in forced.adapters for i in a.infos.values()} == {torch.float32}
    assert forced.report["size"]["bytes"] == distinct_bytes(forced)


def test_nan_in_an_input_is_named():
    bad = update(1, 2)
    bad.a[0, 0, 0] = float("nan")
    adapters = [adapter("good", {"m": update(2, 2)}), adapter("bad", {"m": bad})]
    with pytest.raises(NonFiniteError, match=r"m\.lora_A.*bad"):
        flex(adapters, 1)


def test_events():
    class Record(MergeCallback):
        def __init__(self):
            self.blocks, self.sizes, self.measured = {}, [], []

        def on_tensor_measured(self, event):
            self.measured.append(event.name)

        def on_block_merged(self, event):
            self.blocks[event.name] = event.groups

        def on_size_reached(self, event):
            self.sizes.append((event.algorithm, event.models, event.bytes))

    adapters = plain(3, 2)
    record = Record()
    found = flex(adapters, 2, callbacks=[record])
    assert record.measured == list(record.blocks) == NAMES
    size = found.report["size"]
    assert record.sizes == [("task_arithmetic", size["adapters"], size["bytes"])]
    assert sorted(t for group in record.blocks[NAMES[0]] for t in group) == ["t0", "t1", "t2"]


@pytest.mark.parametrize("algorithm", ["task_arithmetic", "dare_ties"])
def test_threads_change_nothing(algorithm, monkeypatch):
    def found():
        return flex(some(3, 5, [2, 3]), 2, algorithm=algorithm)

    beside = found()
    monkeypatch.setattr(method, "in_turn", lambda work, pieces, device: map(work, pieces))
    for one, other in zip(beside.adapters, found().adapters, strict=True):
        left, right = state_dict(one), state_dict(other)
        assert list(one.infos) == list(other.infos)
        assert all(torch.equal(left[name], right[name]) for name in right)
