"""What is wrong with the arguments of MergeCheckpoints is said before training."""

from __future__ import annotations

import pytest

from mergekit_ext.callbacks import MergeCheckpoints
from mergekit_ext.errors import ConfigError
from tests.callbacks.small import Net, train


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints("nan_tie", keep=0, every=1.5, on="epoch", keep_better=True)
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    for part in ("keep: found 0", "every: found 1.5", "'epoch'", "Write `nan_ties`", "evaluate="):
        assert part in text
    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints("ema", parameters={"decay": 2, "beta": 1}, base="initial")
    where = {problem.where for problem in caught.value.problems}
    assert where == {"parameters.decay", "parameters.beta", "base"}


def test_what_is_used_when_training_ends_is_checked_at_once(tmp_path):
    class Late:
        def on_merge_end(self): ...

    with pytest.raises(ConfigError) as caught:
        MergeCheckpoints(
            ["lore"],
            seed="x",
            device="cda",
            task=3,
            metric=4,
            load="no",
            evaluate=lambda model: 1.0,
            log=Late(),
            callbacks=[Late()],
            adapter_options=["rank"],
        )
    assert [problem.where for problem in caught.value.problems] == [
        "load",
        "task",
        "metric",
        "seed",
        "device",
        "evaluate",
        "log",
        "callbacks",
        "adapter_options",
        "method",
    ]
    with pytest.raises(ConfigError, match=r"callbacks: found .*; expected a list of them"):
        MergeCheckpoints(callbacks=Late())
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file/folder"):
        with pytest.raises(ConfigError, match=r"where: .*expected a folder that can be written"):
            MergeCheckpoints("linear", where=where).on_train_begin(0, Net())


def test_lists_have_one_value_for_each_snapshot():
    for weights in ([1.0, 2.0], {"step-1": 1.0}):
        callback = MergeCheckpoints("linear", keep=3, parameters={"weight": weights})
        with pytest.raises(ConfigError, match=r"parameters\.weight: .*; .* or a list of 3, one"):
            callback.on_train_begin(0, Net())
    callback = MergeCheckpoints("linear", keep=3, parameters={"weight": [1.0, 2.0, 3.0]})
    train(Net(), [callback], steps=2)
    with pytest.raises(ConfigError, match=r"weight: found 3 values; .* list of 2, one for each"):
        callback.merge()


def test_methods_that_make_several_models_are_refused():
    with pytest.raises(ConfigError, match=r"method: found 'flexmerge'; .* makes one model"):
        MergeCheckpoints("flexmerge")


def test_problems_of_the_method_come_before_training():
    callback = MergeCheckpoints("lore", parameters={"mu": "a", "rank": 3, "rank_ratio": 0.5})
    with pytest.raises(ConfigError) as caught:
        callback.on_train_begin(0, Net())
    assert {p.where for p in caught.value.problems} == {"parameters.mu", "parameters.rank"}
    callback = MergeCheckpoints("lore", parameters={})
    with pytest.raises(ConfigError, match="none of mu, mu_relative, rank_ratio"):
        callback.on_train_begin(0, Net())
    callback = MergeCheckpoints("slerp", keep=3, parameters={"t": 0.5})
    with pytest.raises(ConfigError, match="keep: found 3 snapshots"):
        callback.on_train_begin(0, Net())
    with pytest.raises(ConfigError, match="`linear` has no base"):
        MergeCheckpoints("linear", base="initial").on_train_begin(0, Net())
    with pytest.raises(ConfigError, match="which merges adapters"):
        MergeCheckpoints("peft_ties").on_train_begin(0, Net())


def test_parameters_that_are_divided_among_processes_are_refused():
    model = Net()
    model.first.weight.ds_id = 1  # as ZeRO-3 marks them
    with pytest.raises(ConfigError, match=r'FSDP or ZeRO-3.*on="save"'):
        MergeCheckpoints("average").on_step_end(1, model)
