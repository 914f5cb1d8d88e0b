"""Batches with rows of several tasks: each row is what its task's own module computes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mergekit_ext.errors import ConfigError
from mergekit_ext.flexmerge import Batched, load, routing
from tests.flexmerge.handmade import models, write
from tests.flexmerge.test_factored import MAKERS
from tests.flexmerge.test_runtime import TASKS, dense
from tests.models import bert

ROWS = ["c", "a", "d", "a", "b", "c", "a"]


def crossed(block: str) -> list[tuple[list[str], str]]:
    """Pairs of which no order of the tasks makes all neighbours."""
    pairs = ("ab", "cd") if "attention" in block else ("ac", "bd")
    return [([*pair], "dense") for pair in pairs]


GROUPS = {
    "dense": dense,
    "crossed": crossed,
    "masked": lambda block: [(["a"], "dense"), (["b", "c", "d"], "masked")],
    "residual": lambda block: [(TASKS, "residual")],
}
CASES = [
    *((kind, groups) for kind in ("vit", "llama", "t5") for groups in ("dense", "residual")),
    ("llama", "crossed"),
    *(("bert", groups) for groups in GROUPS),
    ("tied llama", "residual"),
    ("gpt2", "residual"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, found = tmp_path_factory.mktemp("routing"), {}

    def get(kind: str, groups: str) -> tuple[dict[str, Any], Any]:
        if (kind, groups) not in found:
            place, (make, private) = folder / f"{kind} {groups}", MAKERS[kind]
            base, paths = models(place, make, TASKS)
            write(place / "out", base, paths, GROUPS[groups], private)
            alone = load(place / "out")
            found[kind, groups] = alone, Batched(alone)
        return found[kind, groups]

    return get


def inputs_of(kind: str, count: int = len(ROWS)) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn(count, 3, 8, 8)}
    ids, mask = torch.randint(3, 32, (count, 6)), torch.ones(count, 6, dtype=torch.long)
    for row in range(count):  # padded on the left
        mask[row, : row % 3] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return {**found, "decoder_input_ids": ids[:, :4]} if kind == "t5" else found


def of_task(inputs: dict[str, torch.Tensor], task: str) -> dict[str, torch.Tensor]:
    rows = [row for row, name in enumerate(ROWS) if name == task]
    return {name: tensor[rows] for name, tensor in inputs.items()}


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_each_row_is_its_own_models(kind: str, groups: str, made: Any) -> None:
    alone, model = made(kind, groups)
    inputs = inputs_of(kind)
    with torch.no_grad():
        together = model(**inputs, tasks=ROWS).logits
        for task in TASKS:
            expected = alone[task](**of_task(inputs, task)).logits
            rows = [row for row, name in enumerate(ROWS) if name == task]
            torch.testing.assert_close(together[rows], expected, rtol=1e-4, atol=1e-5)
        one = model(**of_task(inputs, "a"), tasks=["a"] * 3).logits
        torch.testing.assert_close(one, together[[1, 3, 6]], rtol=1e-4, atol=1e-5)


COPIES = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, COPIES], ids=str)
@pytest.mark.parametrize(
    ("kind", "groups"), [case for case in CASES if case[0] not in ("vit", "bert")]
)
def test_each_row_is_generated_by_its_own_model(
    kind: str, groups: str, settings: dict[str, int], made: Any
) -> None:
    alone, model = made(kind, groups)
    inputs = inputs_of(kind)
    inputs.pop("decoder_input_ids", None)
    settings = {**settings, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    if kind == "t5":
        settings["decoder_start_token_id"] = 0
    together = model.generate(**inputs, tasks=ROWS, **settings)
    for task in TASKS:
        expected = alone[task].generate(**of_task(inputs, task), **settings)
        rows = [row for row, name in enumerate(ROWS) if name == task]
        each = together.view(len(ROWS), -1, together.shape[-1])
        assert torch.equal(each[rows].flatten(0, 1), expected)


def test_rows_have_their_numbers_wherever_generation_counts_them(made: Any) -> None:
    alone, model = made("llama", "dense")
    inputs, settings = inputs_of("llama"), {"max_new_tokens": 2, "pad_token_id": 0}
    own = {"prefix_allowed_tokens_fn": lambda row, _: [row + 10]}
    found = model.generate(**inputs, tasks=ROWS, **settings, **own)
    assert found[:, -1].tolist() == [10, 11, 12, 13, 14, 15, 16]
    beams = transformers.GenerationConfig(
        num_beams=2, return_dict_in_generate=True, output_scores=True, eos_token_id=1, **settings
    )
    ids = inputs.pop("input_ids")
    found = model.generate(ids, beams, **inputs, tasks=ROWS)
    scores = model.model.compute_transition_scores(
        found.sequences, found.scores, found.beam_indices
    )
    for row, task in enumerate(ROWS):
        mask = inputs["attention_mask"][row : row + 1]
        single = alone[task].generate(ids[row : row + 1], beams, attention_mask=mask)
        given = single.sequences, single.scores, single.beam_indices
        expected = alone[task].compute_transition_scores(*given)[0]
        torch.testing.assert_close(scores[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_a_static_cache(made: Any) -> None:
    """T5's table of positions gets the length so far as a tensor."""
    _, model = made("t5", "dense")
    inputs, settings = inputs_of("t5"), {"max_new_tokens": 5, "decoder_start_token_id": 0}
    del inputs["decoder_input_ids"]
    plain, static = (
        model.generate(**inputs, tasks=ROWS, **settings, pad_token_id=0, **own)
        for own in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(static, plain)


def test_a_cache_goes_on_with_its_tasks_alone(made: Any) -> None:
    model, inputs = made("llama", "dense")[1], inputs_of("llama")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, tasks=ROWS).logits[:, -1]
        first = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], tasks=ROWS)
        then = {"input_ids": ids[:, -1:], "attention_mask": mask}
        cache = first.past_key_values
        for tasks in ([*ROWS[1:], ROWS[1]], ROWS[:-1]):
            own = {name: value[: len(tasks)] for name, value in then.items()}
            with pytest.raises(ConfigError, match="past_key_values: found a cache of other tasks"):
                model(**own, past_key_values=cache, tasks=tasks)
        found = model(**then, past_key_values=cache, tasks=ROWS).logits[:, -1]
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
        settings = {"max_new_tokens": 2, "pad_token_id": 0, "return_dict_in_generate": True}
        unmoved = model.generate(**inputs, tasks=ROWS, streamer=Unheard(), **settings)
        with pytest.raises(ConfigError, match="from a call that sorted the rows alike"):
            model(**then, past_key_values=unmoved.past_key_values, tasks=ROWS)


class Unheard:
    """A streamer."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


def test_positions_to_keep_are_no_rows(made: Any) -> None:
    model, inputs = made("llama", "dense")[1], inputs_of("llama")
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    with torch.no_grad():
        whole = model(**inputs, tasks=ROWS).logits
        found = model(**inputs, tasks=ROWS, logits_to_keep=positions).logits
    torch.testing.assert_close(found, whole[:, positions], rtol=1e-4, atol=1e-5)


def test_threads_take_turns(made: Any) -> None:
    _, model = made("llama", "crossed")
    inputs = inputs_of("llama")

    def logits(tasks: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, tasks=tasks).logits

    wanted = [ROWS, ROWS[::-1], ["d"] * 7, ["b", "a"] * 3 + ["c"]]
    expected = [logits(tasks) for tasks in wanted]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(logits, wanted * 8))
    for own, right in zip(found, expected * 8, strict=True):
        assert torch.equal(own, right)


@pytest.mark.parametrize(("kind", "groups"), [("vit", "dense"), ("gpt2", "residual")])
def test_gradients_and_what_is_trained(kind: str, groups: str, made: Any) -> None:
    """Norms and biases of a batch before had no gradients, and the values from before training."""
    alone = copy.deepcopy(made(kind, groups)[0])
    model, inputs = Batched(alone), inputs_of(kind)
    with torch.no_grad():
        model(**inputs, tasks=ROWS)
    own = [p.requires_grad_() for a in alone.values() for p in a.parameters()]

    def gradients(loss: torch.Tensor) -> dict[Any, torch.Tensor]:
        """What each memory gets; tasks that share it have parameters of their own."""
        sums: dict[Any, torch.Tensor] = {}
        for p, found in zip(own, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
            if found is not None:
                key = p.data_ptr(), p.shape
                sums[key] = sums.get(key, torch.zeros(())) + found
        return sums

    def separate() -> torch.Tensor:
        each = {task: iter(alone[task](**of_task(inputs, task)).logits) for task in TASKS}
        return torch.stack([next(each[task]) for task in ROWS])

    found = gradients(model(**inputs, tasks=ROWS).logits.square().mean())
    expected = gradients(separate().square().mean())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        for p in own:
            p.mul_(1.1)
        together = model(**inputs, tasks=ROWS).logits
        torch.testing.assert_close(together, separate(), rtol=1e-4, atol=1e-5)


def test_evaluation_mode_is_that_of_the_models() -> None:
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    a = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).train()
    b = copy.deepcopy(a)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.mul_(1.5)
        images = torch.randn(2, 3, 32, 32)
        found = Batched({"a": a, "b": b}).eval()(images, tasks=["b", "a"]).logits
        for row, own in enumerate((b.eval(), a.eval())):
            torch.testing.assert_close(found[row], own(images).logits[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [2, 5])
def test_positions_of_mpnet(length: int) -> None:
    """A batch of as many rows as tokens, too: the table gets a square."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.MPNetConfig(vocab_size=32, num_attention_heads=2, **sizes)
    a = transformers.MPNetModel(config).eval()
    b = copy.deepcopy(a)
    with torch.no_grad():
        a.encoder.relative_attention_bias.weight.normal_(0, 3)
        b.encoder.relative_attention_bias.weight.normal_(0, 3)
        ids = torch.randint(3, 32, (2, length))
        found = Batched({"a": a, "b": b})(ids, tasks=["b", "a"]).last_hidden_state
        for row, own in enumerate((b, a)):
            torch.testing.assert_close(found[row], own(ids).last_hidden_state[row])


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_large_parts_one_after_another_are_the_same(
    kind: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, calls = made(kind, "dense")[1], inputs_of(kind), []
    model.model.register_forward_hook(lambda *_: calls.append("together"))
    settings = {"output_hidden_states": True, **({"use_cache": False} if kind == "llama" else {})}
    with torch.no_grad():
        together = model(**inputs, **settings, tasks=ROWS)
        monkeypatch.setattr(routing, "_LARGE", 0)
        model(**inputs, **settings, tasks=ROWS)  # which shows that all that comes out is rows
        apart = model(**inputs, **settings, tasks=ROWS)
        assert len(calls) == 2
        torch.testing.assert_close(apart.logits, together.logits, rtol=1e-4, atol=1e-5)
        for own, expected in zip(apart.hidden_states, together.hidden_states, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
        if kind == "llama":  # with a cache, rows are not taken apart
            for _ in range(2):
                found = model(**inputs, **{**settings, "use_cache": True}, tasks=ROWS)
                torch.testing.assert_close(found.logits, together.logits, rtol=1e-4, atol=1e-5)
                assert found.past_key_values.get_seq_length() == 6
            assert len(calls) == 4


def test_large_parts_of_tasks_with_the_same_model(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = made("bert", "dense")
    model = Batched({"a": alone["a"], "b": alone["a"], "c": alone["c"]})
    inputs, tasks = inputs_of("bert"), ["c", "b", "a", "c", "b", "b", "a"]
    monkeypatch.setattr(routing, "_LARGE", 0)
    with torch.no_grad():
        together, apart = (model(**inputs, tasks=tasks).logits for _ in range(2))
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", ["text_projection", "logit_scale", None])
def test_a_model_that_compares_rows_gives_a_result_for_each_task(own: str | None) -> None:
    """CLIP's logits have a column for each row of the batch, of whichever task it is."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 2, "vocab_size": 32, "max_position_embeddings": 6}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    a = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    b = copy.deepcopy(a.eval())
    with torch.no_grad():
        for name, parameter in b.named_parameters():
            if own and name.startswith(own):
                parameter.add_(torch.randn_like(parameter))
    alone, tasks = {"a": a, "b": b}, ["b", "a", "b", "a", "b"]
    model, inputs = Batched(alone), {**inputs_of("vit", 5), **inputs_of("llama", 5)}
    with torch.no_grad():
        paired = model(**inputs, tasks=tasks, return_loss=True)
        # Texts for the images of all tasks, as the names of classes are.
        names = {name: inputs[name][:3] for name in ("input_ids", "attention_mask")}
        classes = model(pixel_values=inputs["pixel_values"], **names, tasks=tasks)
        for task, single in alone.items():
            rows = [row for row, name in enumerate(tasks) if name == task]
            given = {name: tensor[rows] for name, tensor in inputs.items()}
            expected = single(**given, return_loss=True)
            for name in ("logits_per_image", "logits_per_text", "image_embeds", "loss"):
                torch.testing.assert_close(paired[task][name], expected[name])
            expected = single(pixel_values=given["pixel_values"], **names).logits_per_image
            torch.testing.assert_close(classes[task].logits_per_image, expected)


def test_heads_of_different_shape_give_a_result_for_each_task(tmp_path: Path) -> None:
    base, paths = models(tmp_path, bert, TASKS)
    other = transformers.BertForSequenceClassification.from_pretrained(
        paths["d"], num_labels=5, ignore_mismatched_sizes=True
    )
    other.save_pretrained(paths["d"])
    write(tmp_path / "out", base, paths, dense)
    alone, inputs = load(tmp_path / "out"), inputs_of("bert")
    with pytest.raises(ConfigError, match="labels: found labels; expected none"):
        Batched(alone)(**inputs, tasks=ROWS, labels=torch.zeros(len(ROWS), dtype=torch.long))
    with torch.no_grad():
        found = Batched(alone)(**inputs, tasks=ROWS).logits
        assert {task: len(logits) for task, logits in found.items()} == {
            "a": 3,
            "b": 1,
            "c": 2,
            "d": 1,
        }
        for task, logits in found.items():
            expected = alone[task](**of_task(inputs, task)).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_all_tasks_share_stay_as_they_are(made: Any) -> None:
    alone, _ = made("llama", "dense")
    same = Batched({"a": alone["a"], "b": alone["a"]})
    assert not any("forward" in vars(module) for module in same.model.modules())
    a, b = alone["a"], alone["b"]  # which differ in their heads
    own = {n for n, m in Batched({"a": a, "b": b}).model.named_modules() if "forward" in vars(m)}
    assert own == {"lm_head"}


def test_what_cannot_be_mixed_is_refused_when_it_is_reached(tmp_path: Path) -> None:
    """Experts see tokens, not rows."""
    make, private = MAKERS["mixtral"]
    base, paths = models(tmp_path, make, TASKS)
    write(tmp_path / "out", base, paths, dense, private)
    model = Batched(load(tmp_path / "out"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="one after another"):
        model(**inputs_of("llama"), tasks=ROWS)
    with torch.no_grad():
        model(**inputs_of("llama"), tasks=["d"] * len(ROWS))


def test_a_table_of_as_many_rows_as_the_batch_is_refused() -> None:
    """DeBERTa's norm of relative positions sees a parameter."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "position_buckets": 2}
    relative = {"relative_attention": True, "pos_att_type": ["c2p"], "norm_rel_ebd": "layer_norm"}
    config = transformers.DebertaV2Config(vocab_size=32, **sizes, **layers, **relative)
    a = transformers.DebertaV2ForSequenceClassification(config).eval()
    encoder = a.deberta.encoder
    b = copy.deepcopy(a, {id(t): t for t in a.parameters() if t is not encoder.LayerNorm.weight})
    with torch.no_grad():
        encoder.LayerNorm.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"encoder\.LayerNorm gets \[4, 8\] for 4 rows"):
            Batched({"a": a, "b": b})(torch.randint(3, 32, (4, 6)), tasks=["a", "a", "b", "b"])


def test_positions_of_as_many_as_the_batch_are_no_rows() -> None:
    """Whisper's encoder looks up its positions for all rows at once."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 4}
    a = transformers.WhisperModel(
        transformers.WhisperConfig(vocab_size=32, d_model=8, pad_token_id=0, **heads, **layers)
    ).eval()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.encoder.embed_positions.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"embed_positions gets \[4\] for 4 rows, whose"):
            Batched({"a": a, "b": b})(
                torch.randn(4, 4, 8), decoder_input_ids=torch.ones(4, 2).long(), tasks=[*"abab"]
            )


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["a"], "found 1 for 7 rows"),
        ([*ROWS[:6], "e"], "tasks: found e; expected some of a, b, c"),
    ],
)
def test_tasks_that_do_not_fit_the_rows(tasks: list[str], message: str, made: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        made("llama", "dense")[1](**inputs_of("llama"), tasks=tasks)


def test_images_that_are_not_rows(made: Any) -> None:
    """Qwen2-VL gets the patches of all images in one tensor, which cannot follow their rows."""
    inputs = {**inputs_of("llama"), "pixel_values": torch.zeros(28, 4)}
    with pytest.raises(
        ConfigError, match=r"found 7 for 28 rows; expected one for each row, images too"
    ):
        made("llama", "dense")[1](**inputs, tasks=ROWS)


def test_models_that_compute_different_things(made: Any) -> None:
    llama, gpt2 = made("llama", "dense")[0]["a"], made("gpt2", "residual")[0]["a"]
    with pytest.raises(ConfigError, match="found GPT2LMHeadModel; expected LlamaForCausalLM"):
        Batched({"a": llama, "b": gpt2})


@pytest.mark.parametrize("tasks", ["aaaaaaa", None, [], [1] * 7, 3], ids=repr)
def test_tasks_that_are_no_list_of_names(tasks: Any, made: Any) -> None:
    with pytest.raises(ConfigError, match="expected a list of names, one for each row, of a, b"):
        made("llama", "dense")[1](**inputs_of("llama"), tasks=tasks)


@pytest.mark.parametrize("models", [None, [], {}, {"a": 1}, "out"], ids=repr)
def test_what_is_no_mapping_to_models(models: Any) -> None:
    with pytest.raises(ConfigError, match="expected a mapping from tasks to models"):
        Batched(models)


def test_what_a_batch_is_not_for_is_said(made: Any) -> None:
    model = Batched(made("llama", "dense")[0])
    with pytest.raises(RuntimeError, match="call `Batched` itself, with `tasks`"):
        model.model(**inputs_of("llama"))
    for use in (copy.deepcopy, pickle.dumps, lambda it: it.load_state_dict(it.state_dict())):
        with pytest.raises(RuntimeError, match="use each task's own model"):
            use(model)


def test_dtypes_are_one_and_stay(made: Any) -> None:
    a = made("llama", "dense")[0]["a"]
    with pytest.raises(ConfigError, match=r"found torch\.float16; expected torch\.float32"):
        Batched({"a": a, "b": copy.deepcopy(a).half()})
    with pytest.raises(ConfigError, match="a change of dtype or device"):
        made("llama", "dense")[1].half()
