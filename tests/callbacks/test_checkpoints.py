"""Merging whole-model snapshots while training."""

from __future__ import annotations

import copy

import pytest
import torch

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError, MergeWarning, NonFiniteError
from mergekit_ext.host import state_dicts
from mergekit_ext.kernels.lore import lore
from tests.callbacks.small import Net, llama, mean, same, train

TIED = "third.weight"  # the second name of second.weight


def floating(state):
    return [k for k, t in state.items() if t.is_floating_point() and k != TIED]


def test_average_and_ema_are_the_weighted_means_of_all_snapshots():
    model = Net()
    average = MergeCheckpoints("average", every=2)
    decay = 0.7
    ema = MergeCheckpoints("ema", parameters={"decay": decay})
    raw = MergeCheckpoints("ema", parameters={"decay": decay, "bias_correction": False})
    states = train(model, [average, ema, raw], steps=7)
    names = floating(states[0])
    found = average.merge().weights.tensors
    same({k: found[k] for k in names}, mean(states[1::2], names))
    assert average.merge().steps == (2, 4, 6)
    weights = torch.tensor([decay ** (7 - i) for i in range(1, 8)], dtype=torch.float64)
    expected = {
        k: sum(w * s[k].double() for w, s in zip(weights / weights.sum(), states, strict=True))
        for k in names
    }
    found = ema.merge().weights.tensors
    same({k: found[k].double() for k in names}, expected, rtol=1e-5, atol=1e-6)
    slow = states[0]
    for state in states[1:]:
        slow = {k: decay * slow[k] + (1 - decay) * state[k] for k in names}
    found = raw.merge().weights.tensors
    same({k: found[k] for k in names}, {k: slow[k] for k in names}, rtol=1e-5, atol=1e-6)


def test_tied_weights_are_kept_once_and_integers_are_the_last_ones():
    model = Net()
    callback = MergeCheckpoints("average")
    model.train()
    callback.on_train_begin(0, model)
    for step in (1, 2, 3):
        model(torch.randn(4, 6))
        callback.on_step_end(step, model)
    merged = callback.merge().weights.tensors
    assert TIED not in merged and "second.weight" in merged
    assert merged["norm.num_batches_tracked"].item() == 3
    assert merged["norm.num_batches_tracked"].dtype == torch.int64


def test_half_precision_is_averaged_in_float32_and_returned_in_its_own_dtype():
    model = llama(dtype=torch.bfloat16)
    callback = MergeCheckpoints("average")
    states = train(model, [callback], steps=9)
    found = callback.merge().weights.tensors
    for name in floating(states[0]):
        exact = torch.stack([s[name].double() for s in states]).mean(0).to(torch.bfloat16)
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], exact, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_lore_is_that_of_the_last_snapshots(tmp_path, where):
    place = "memory" if where == "memory" else tmp_path / "snapshots"
    callback = MergeCheckpoints(
        "lore", keep=3, every=2, where=place, parameters={"mu_relative": 0.2}
    )
    states = train(Net(), [callback], steps=9)
    assert callback.steps == (4, 6, 8)
    merged = callback.merge()
    assert merged.steps == (4, 6, 8) and merged.step == 8
    last = [states[i] for i in (3, 5, 7)]
    expected = lore([s["first.weight"] for s in last], mu_relative=0.2).merged
    torch.testing.assert_close(merged.weights.tensors["first.weight"], expected)
    other = mean(last, ["first.weight"])["first.weight"]
    assert (expected - other).norm() > 1e-3 * other.norm()  # it is not the average anyway


def test_on_demand_up_to_a_step():
    callback = MergeCheckpoints("linear", keep=4)
    states = train(Net(), [callback], steps=4)
    early = callback.merge(2)
    assert early.steps == (1, 2)
    names = floating(states[0])
    same({k: early.weights.tensors[k] for k in names}, mean(states[:2], names))
    with pytest.raises(ConfigError, match=r"none up to step 0 \(there are those of \[1, 2, 3, 4\]"):
        callback.merge(0)
    running = MergeCheckpoints("average")
    train(Net(), [running], steps=3)
    with pytest.raises(ConfigError, match="3 or later: `average` keeps no snapshots"):
        running.merge(2)


NEEDED = {
    "lore": {"mu_relative": 0.1},
    "nearswap": {"t": 0.5},
    "slerp": {"t": 0.5},
}
KEEP = {"nearswap": 1, "slerp": 1, "arcee_fusion": 1, "nuslerp": 2, "passthrough": 1}


@pytest.mark.filterwarnings("ignore::mergekit_ext.errors.MergeWarning")
def test_every_registered_method_merges(recwarn):
    methods = state_dicts.known_methods()
    assert {"lore", "nan_ties", "tsv_m", "linear", "model_stock"} <= set(methods)
    assert "flexmerge" not in methods
    start = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    for method in methods:
        plain = method.removeprefix("nan_")
        model = copy.deepcopy(start)
        callback = MergeCheckpoints(
            method, keep=KEEP.get(plain, 3), parameters=NEEDED.get(plain, {})
        )
        states = train(model, [callback], steps=3)
        merged = callback.merge().weights.tensors
        assert set(merged) == set(states[0]), method
        for name, tensor in merged.items():
            assert tensor.isfinite().all() and tensor.dtype == torch.float32, method
            assert tensor.shape == states[0][name].shape, method


def test_the_initial_weights_are_the_base_and_coefficients_may_span_the_model():
    model = Net()
    initial = copy.deepcopy(model.state_dict())
    arithmetic = MergeCheckpoints("task_arithmetic", keep=2, parameters={"weight": 0.5})
    whole = MergeCheckpoints("nan", keep=2, parameters={"granularity": "model"}, base="initial")
    states = train(model, [arithmetic, whole], steps=3)
    names = floating(initial)
    expected = {
        k: initial[k] + 0.5 * ((states[1][k] - initial[k]) + (states[2][k] - initial[k]))
        for k in names
    }
    found = arithmetic.merge().weights.tensors
    same({k: found[k] for k in names}, expected, rtol=1e-5, atol=1e-6)
    norms = [
        sum(float((s[k] - initial[k]).double().square().sum()) for k in names) ** 0.5
        for s in states[1:]
    ]
    share = (1 / norms[0]) / (1 / norms[0] + 1 / norms[1])
    found = whole.merge().weights.tensors
    expected = {
        k: initial[k]
        + share * (states[1][k] - initial[k])
        + (1 - share) * (states[2][k] - initial[k])
        for k in names
    }
    same({k: found[k] for k in names}, expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_is_needed_and_was_not_seen_is_an_error_in_the_first_step():
    callback = MergeCheckpoints("ties", every=100)
    with pytest.raises(ConfigError, match=r"training had begun.*on_train_begin\(0, model\)"):
        train(Net(), [callback], steps=1, begin=False)
    model = Net()
    for base in (model, dict(model.state_dict())):
        callback = MergeCheckpoints("ties", keep=2, base=base)
        train(copy.deepcopy(model), [callback], steps=2, begin=False)
        assert callback.merge().weights.tensors["first.weight"].isfinite().all()
    callback = MergeCheckpoints("ties", base={"other": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"base: found no tensor .*, and \d+ more"):
        callback.on_train_begin(0, model)
    base = {**model.state_dict(), "first.bias": torch.zeros(3), "norm.bias": torch.zeros(2)}
    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints("ties", base=base).on_step_end(1, model)
    assert len(caught.value.problems) == 2 and "of shape (3,)" in str(caught.value)


def test_random_methods_leave_the_random_numbers_of_training_alone():
    callback = MergeCheckpoints("dare_ties", keep=2, parameters={"density": 0.5})
    train(Net(), [callback], steps=3)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = callback.merge().weights.tensors
    torch.testing.assert_close(torch.rand(3), expected)
    same(callback.merge().weights.tensors, one)


def test_memory_is_bounded_by_keep():
    model = torch.nn.Linear(256, 256)
    size = sum(p.numel() * 4 for p in model.parameters())
    callback = MergeCheckpoints("linear", keep=3)
    held = []
    for step in range(1, 9):
        callback.on_step_end(step, model)
        kept = callback.state_dict()["collected"].values()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for snapshot in kept
            for t in snapshot["tensors"].values()
        }
        held.append(sum(storages.values()))
    assert held == [size, 2 * size] + [3 * size] * 6
    running = MergeCheckpoints("ema")
    for step in range(1, 6):
        running.on_step_end(step, model)
    mean_ = running.state_dict()["collected"]["mean"]["tensors"]
    assert sum(t.untyped_storage().nbytes() for t in mean_.values()) == size


def test_disk_is_bounded_by_keep_at_every_moment(tmp_path, monkeypatch):
    from mergekit_ext.callbacks import store

    place = tmp_path / "snapshots"
    peak = []
    stock = store.write

    def write(weights, target):
        stock(weights, target)
        peak.append(sum(f.stat().st_size for f in place.rglob("*.safetensors")))

    monkeypatch.setattr(store, "write", write)
    model = torch.nn.Linear(256, 256)
    size = sum(p.numel() * 4 for p in model.parameters())
    callback = MergeCheckpoints("linear", keep=2, where=place)
    train(model, [callback], steps=7)
    assert [p.name for p in sorted(place.iterdir())] == ["step-00000006", "step-00000007"]
    assert len(peak) == 7 and max(peak) < 2.1 * size and min(peak[1:]) > 1.9 * size


def test_what_is_not_finite_is_an_error_with_tensor_and_step():
    for method in ("average", "lore"):
        model = Net()
        parameters = {"mu_relative": 0.1} if method == "lore" else {}
        callback = MergeCheckpoints(method, parameters=parameters)
        train(model, [callback], steps=2)
        with torch.no_grad():
            model.first.bias[1] = float("nan")
        with pytest.raises(NonFiniteError, match=r"first\.bias of model at step 3: found 1 "):
            callback.on_step_end(3, model)
        assert callback.steps == (1, 2)


def test_a_base_that_is_not_finite_is_an_error_before_training():
    model = Net()
    with torch.no_grad():
        model.first.bias[1] = float("inf")
    for base in ("initial", model, dict(model.state_dict())):
        with pytest.raises(NonFiniteError, match=r"first\.bias of model base"):
            MergeCheckpoints("ties", base=base).on_train_begin(0, model)


@pytest.mark.parametrize("method", ["linear", "average"])
def test_a_model_whose_tensors_change_is_an_error_in_that_step(method):
    model = Net()
    callback = MergeCheckpoints(method)
    train(model, [callback], steps=2)
    before = callback.merge().weights.tensors["scale"].clone()
    model.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        ConfigError, match=r"(?s)step 3;.*scale of shape \(2,\); .*first snapshot's"
    ):
        callback.on_step_end(3, model)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    model.more = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="a new tensor more"):
        callback.on_step_end(3, model)
    assert callback.steps == (1, 2)
    torch.testing.assert_close(callback.merge().weights.tensors["scale"], before)


def test_an_evaluation_that_fails_loses_neither_the_merge_nor_the_weights():
    scores = iter([1.0])
    model = Net()
    callback = MergeCheckpoints("average", load=True, evaluate=lambda model, task: next(scores))
    states = train(model, [callback], steps=2)
    with pytest.raises(StopIteration):
        callback.on_train_end(2, model)
    assert callback.result.steps == (1, 2) and not callback.result.loaded
    same(dict(model.state_dict()), states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"method": "average"}, {"method": "ties", "keep": 3}])
def test_a_second_training_begins_anew(tmp_path, options):
    where = {"where": tmp_path / "s"} if options["method"] == "ties" else {}
    callback = MergeCheckpoints(**options, **where)
    train(Net(), [callback], steps=5)
    train(Net(1), [callback], steps=2)
    assert callback.steps == (1, 2)
    fresh = MergeCheckpoints(**options)
    train(Net(1), [fresh], steps=2)
    same(callback.merge().weights.tensors, fresh.merge().weights.tensors)


def test_loading_and_keeping_the_better_one():
    distances = []

    def score(model, task):
        assert not model.training and task == "toy"
        distances.append(float(model.first.weight.detach().norm()))
        return {"loss": distances[-1]}

    def run(**options):
        model = Net()
        model.train()
        callback = MergeCheckpoints(
            "linear", keep=3, evaluate=score, task="toy", load=True, keep_better=True, **options
        )
        states = train(model, [callback], steps=4)
        callback.on_train_end(4, model)
        assert model.training and model.norm.training
        return model, callback.result, states

    model, result, states = run(greater_is_better=False)
    merged = result.weights.tensors["first.weight"]
    assert result.scores["loss"] == pytest.approx(float(merged.norm()))
    assert result.before["loss"] == pytest.approx(float(states[-1]["first.weight"].norm()))
    assert result.scores["loss"] < result.before["loss"]  # the mean of random steps is nearer
    assert result.loaded
    torch.testing.assert_close(model.first.weight.detach(), merged)
    assert model.third.weight is model.second.weight

    model, result, states = run(greater_is_better=True)
    assert not result.loaded
    same(dict(model.state_dict()), states[-1], rtol=0, atol=0)


def test_nothing_is_loaded_unless_asked():
    model = Net()
    callback = MergeCheckpoints("average", evaluate=lambda model, task: 1.0)
    states = train(model, [callback], steps=2)
    callback.on_train_end(2, model)
    assert callback.result.scores == {"score": 1.0} and not callback.result.loaded
    same(dict(model.state_dict()), states[-1], rtol=0, atol=0)


def test_start_and_a_run_that_was_too_short():
    callback = MergeCheckpoints("average", start=4, every=2)
    train(Net(), [callback], steps=7)
    assert callback.steps == (4, 6)
    callback = MergeCheckpoints("average", start=10)
    model = Net()
    train(model, [callback], steps=3)
    with pytest.warns(MergeWarning, match="no snapshot was taken in 3 steps"):
        callback.on_train_end(3, model)
