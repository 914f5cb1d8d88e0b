"""Whatever makes a folder usable comes along with its weights: `mergekit_ext.io.model_files`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import mergekit_ext
from mergekit_ext.errors import ConfigError, MergeWarning
from mergekit_ext.flexmerge import load
from mergekit_ext.flexmerge.reader import export
from mergekit_ext.host.checks.merge import check_source
from mergekit_ext.host.inputs import folder_of
from mergekit_ext.io import model_files
from tests import models as small
from tests import sentence_models as sentences
from tests.attacks.readers import command
from tests.reference import nan as reference

QUIET = MergeOptions(quiet=True)
USED = {
    "generation_config.json": json.dumps({"eos_token_id": [2, 5], "temperature": 0.3}),
    "preprocessor_config.json": '{"image_size": 8}',
    "processor_config.json": "{}",
    "modeling_own.py": "class Own: pass\n",
    "vocab.txt": "w0\nw1\n",
    "LICENSE": "as you like",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "qformer_tokenizer/tokenizer.json": "{}",
    "speakers/one.npy": "a voice",
}
NOT_USED = (
    "README.md",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "events.out.tfevents.1",
    "original/consolidated.00.pth",
    "original/params.json",
    "checkpoint-5/model.safetensors",
    "checkpoint-5/config.json",
    "runs/today/log.json",
    ".cache/huggingface/x.json",
)


def put(folder: Path, name: str, text: str = "") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def family(tmp_path):
    base, tuned = small.family(tmp_path, small.llama, amounts=(0.1, 0.2))
    for folder in (base, *tuned):
        small.tokenizer(folder)
    for name, text in USED.items():
        put(base, name, text)
    for name in NOT_USED:
        put(base, name)
    return base, tuned


def found_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", ["nan", "lore", "linear"])
def test_all_of_the_donors_folder_but_weights_and_what_describes_it(family, tmp_path, method):
    base, tuned = family
    parameters = {"weight": 1.0} | ({"mu_relative": 0.1} if method == "lore" else {})
    models = tuned if method != "linear" else [base, *tuned]
    given = base if method != "linear" else None
    config = small.config(method, models, given, parameters)
    mergekit_ext.merge(yaml.safe_dump(config), tmp_path / "out", QUIET)
    made = {"config.json", "README.md", "mergekit_config.yml", "model.safetensors"}
    made |= {"merge_report.json"}
    expected = {*USED, *made, "tokenizer.json", "tokenizer_config.json"}
    assert found_in(tmp_path / "out") == expected
    for name, text in USED.items():
        assert (tmp_path / "out" / name).read_text() == text


def test_under_mergekits_own_command(family, tmp_path):
    base, tuned = family
    content = small.config("nan", tuned, base, chat_template="chatml")
    file = small.write_yaml(tmp_path / "merge.yml", content)
    done = command("mergekit-yaml", file, tmp_path / "out")
    assert done.code == 0, done.text
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]


def test_a_template_of_the_merge_is_whole_without_the_donors(family, tmp_path):
    base, tuned = family
    config = small.config("nan", tuned, base, chat_template="chatml")
    mergekit_ext.merge(yaml.safe_dump(config), tmp_path / "out", QUIET)
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert "<|im_start|>" in template
    others = set(USED) - {"additional_chat_templates/tool.jinja"}
    assert others <= found_in(tmp_path / "out")


def test_a_vocabulary_of_the_merge_is_whole_without_the_donors(family, tmp_path):
    base, tuned = family
    small.tokenizer(tuned[0], [f"v{i}" for i in range(64)])
    config = small.config("nan", tuned, base, tokenizer={"source": str(tuned[0])})
    with pytest.warns(MergeWarning, match=r"eos_token_id \[2, 5\] in generation_config.json"):
        mergekit_ext.merge(yaml.safe_dump(config), tmp_path / "out", QUIET)
    found = found_in(tmp_path / "out")
    assert "vocab.txt" not in found
    assert {"generation_config.json", "qformer_tokenizer/tokenizer.json"} <= found
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(2) == "v2"


def test_of_a_merge_that_was_stopped_no_file_is_cut_off(family, tmp_path, monkeypatch):
    base, tuned = family
    config = yaml.safe_dump(small.config("nan", tuned, base))
    copied = shutil.copyfile

    def stop(source, target):
        if Path(source).name == "modeling_own.py":
            Path(target).write_text("class")
            raise KeyboardInterrupt
        return copied(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(model_files.shutil, "copyfile", stop)
        mergekit_ext.merge(config, tmp_path / "out", QUIET)
    mergekit_ext.merge(config, tmp_path / "out", QUIET)
    assert (tmp_path / "out" / "modeling_own.py").read_text() == USED["modeling_own.py"]


def test_what_mergekit_does_not_fetch_from_the_hub_is_fetched(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    source, cache = tmp_path / "repository", tmp_path / "cache" / "snapshots" / "c0ffee"
    kept = ("config.json", "chat_template.jinja", "modeling_own.py", "2_Dense/pytorch_model.bin")
    for name in (*kept, "model.safetensors", "modules.json", "onnx/model.onnx"):
        put(source, name, "{}")
    put(source, "modules.json", json.dumps([{"path": "2_Dense"}]))

    def snapshot(repo, revision=None, cache_dir=None, allow_patterns=("*",), ignore_patterns=()):
        assert repo == "some/model" and revision in (None, "c0ffee")
        for name in found_in(source):
            wanted = any(fnmatch.fnmatch(name, p) for p in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                put(cache, name, (source / name).read_text())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: found_in(source))
    folder = folder_of(ModelReference.parse("some/model"), QUIET)
    assert found_in(folder) == {*kept, "model.safetensors", "modules.json"}


# Sentence-transformers.


def merged(tmp_path, method, models, base, *, parameters=None, **keys):
    config = small.config(method, models, base, parameters, **keys)
    mergekit_ext.merge(yaml.safe_dump(config), tmp_path / "out", QUIET)
    return tmp_path / "out"


def is_of_sentences(folder, loading):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == (
        "sentence-transformers",
        "sentence-similarity",
    )
    assert {"merge", "sentence-similarity", "feature-extraction"} < {*card.data.tags}
    assert loading in card.text


def expected_by_hand(tmp_path, folders, combine):
    """A sentence-transformer whose every tensor is `combine` of those of the inputs."""
    inputs = [sentences.load(folder) for folder in folders]
    states = [model.state_dict() for model in inputs]
    inputs[0].load_state_dict(combine(states))
    return sentences.embeddings(inputs[0])


def test_modules_that_differ_are_merged_like_any_tensor(tmp_path):
    folders = [sentences.make(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    out = merged(tmp_path, "linear", folders, None, parameters={"weight": 0.5})

    def average(states):
        return {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}

    expected = expected_by_hand(tmp_path, folders, average)
    torch.testing.assert_close(sentences.embeddings(sentences.load(out)), expected)


def test_nan_of_modules_that_differ(tmp_path):
    base, *folders = [sentences.make(tmp_path / name, seed) for seed, name in enumerate("bxy")]
    out = merged(tmp_path, "nan", folders, base)
    expected = expected_by_hand(
        tmp_path,
        [base, *folders],
        lambda states: reference.merge(states[1:], states[0]),
    )
    torch.testing.assert_close(
        sentences.embeddings(sentences.load(out)), expected, rtol=1e-4, atol=1e-5
    )
    report = json.loads((out / "merge_report.json").read_text())
    assert "2_Dense.linear.weight" in json.dumps(report)
    is_of_sentences(out, 'SentenceTransformer("out")')


def test_modules_that_are_the_same_are_copied_also_beside_a_bare_base(tmp_path):
    folders = [
        sentences.make(tmp_path / name, seed, dense=7) for seed, name in ((1, "a"), (2, "b"))
    ]
    bare = tmp_path / "a-body"
    out = merged(tmp_path, "nan", folders, bare)
    for name in ("2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"):
        assert (out / name).read_bytes() == (folders[0] / name).read_bytes()
    assert [type(part).__name__ for part in sentences.load(out)] == [
        "Transformer",
        "Pooling",
        "Dense",
    ]


def only_in_one(folders):
    (folders[1] / "2_Dense" / "model.safetensors").unlink()
    return {}, ["different 2_Dense/model.safetensors, or none", "flexmerge"]


def of_another_width(folders):
    sentences.make(folders[1], 2, width=4)
    return {}, ["different 2_Dense/model.safetensors", "the same tensors"]


def a_pickle(folders):
    for folder in folders:
        file = folder / "2_Dense" / "model.safetensors"
        torch.save(load_file(file), folder / "2_Dense" / "pytorch_model.bin")
        file.unlink()
    return {}, ["2_Dense/pytorch_model.bin", "a pickle", "--allow-pickle"]


def norms_of_the_whole_model(folders):
    return {"granularity": "model"}, ["parameters.granularity", "expected `tensor`"]


@pytest.mark.parametrize(
    "spoil", [only_in_one, of_another_width, a_pickle, norms_of_the_whole_model]
)
def test_what_can_be_neither_copied_nor_merged_is_refused(tmp_path, spoil):
    base, *folders = [sentences.make(tmp_path / name, seed) for seed, name in enumerate("bxy")]
    parameters, parts = spoil([base, *folders])
    text = yaml.safe_dump(small.config("nan", folders, base, parameters))
    with pytest.raises(ConfigError) as caught:
        mergekit_ext.merge(text, tmp_path / "out", QUIET)
    for part in parts:
        assert part in str(caught.value)
    ((_, report),) = check_source(text, QUIET)
    assert [str(p) for p in report.problems] == [str(p) for p in caught.value.problems]
    assert not (tmp_path / "out").exists()


def test_settings_of_modules_that_differ_are_named(tmp_path):
    base, *folders = [sentences.make(tmp_path / name, seed) for seed, name in enumerate("bxy")]
    put(folders[0], "1_Pooling/config.json", '{"embedding_dimension": 16, "pooling_mode": "mean"}')
    ((_, report),) = check_source(yaml.safe_dump(small.config("nan", folders, base)), QUIET)
    assert any("1_Pooling/config.json" in n and str(folders[0]) in n for n in report.notes)


def test_a_flexmerge_keeps_each_tasks_own_modules(tmp_path):
    base, *folders = [sentences.make(tmp_path / name, seed) for seed, name in enumerate("bxy")]
    parameters = {"target_size": 1, "algorithm": "average"}
    out = merged(tmp_path, "flexmerge", folders, base, parameters=parameters)
    for task, folder in zip("xy", folders, strict=True):

        def average(states):
            first, second = states
            body = {n: (first[n] + second[n]) / 2 for n in first if n.startswith("0.")}
            return {**first, **body}

        other = folders[1 - folders.index(folder)]
        expected = expected_by_hand(tmp_path, [folder, other], average)
        export(out, task, tmp_path / f"exported-{task}")
        for place in (out / task, tmp_path / f"exported-{task}"):
            model = sentences.load(place)
            torch.testing.assert_close(sentences.embeddings(model), expected)
            is_of_sentences(place, f'SentenceTransformer("{place.name}")')
        body, loaded = sentences.load(out / task)[0].auto_model, load(out, task, verify=True)
        assert all(torch.equal(body.state_dict()[n], t) for n, t in loaded.state_dict().items())
    is_of_sentences(out, 'SentenceTransformer("out/x")')


def test_a_flexmerge_copies_no_pickle_unasked(tmp_path):
    base, *folders = [sentences.make(tmp_path / name, seed) for seed, name in enumerate("bxy")]
    a_pickle(folders)
    with pytest.raises(ConfigError, match=r"2_Dense/pytorch_model\.bin with a pickle"):
        merged(tmp_path, "flexmerge", folders, base, parameters={"target_size": 1})


def test_a_donor_whose_modules_lie_elsewhere_copies_nothing_from_there(tmp_path):
    put(tmp_path / "secret", "model.safetensors", "not a model")
    folder = tmp_path / "model"
    put(folder, "modules.json", json.dumps([{"path": "../secret"}, {"path": str(tmp_path)}]))
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    assert model_files.companions(folder) == ["modules.json"]


def test_a_folder_that_vanishes_while_it_is_listed_is_passed_over(tmp_path, monkeypatch):
    put(tmp_path, "first/vocab.txt", "")
    put(tmp_path, "second/vocab.txt", "")
    stock = model_files.is_weights

    def vanishing(path):
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        return stock(path)

    monkeypatch.setattr(model_files, "is_weights", vanishing)
    assert model_files.companions(tmp_path) == ["first/vocab.txt"]
