"""Faults of what a run is given: responses, lengths, tokenizers, weights, clocks; those of whole runs are `faults`."""

import itertools
import json
import logging
import math
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_tokenizers as toy
from runs import (
    P,
    make_config,
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    state_of,
    verified_steps,
    without_times,
    written,
)
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.data.dataset import Source, prepare
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair, read_rows
from sr_dpo_jax.data.tokens import PairEncoder, load_tokenizer, tokenizer_digest
from sr_dpo_jax.model.logprobs import response_logprobs
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.weights import directory as weights

pytestmark = pytest.mark.usefixtures("same_programs")

WORDS = {word: number for number, word in enumerate(["</s>", "<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
EOS = 0
HI = "\n\nHuman: hi\n\nAssistant:"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 48, seed=1)


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role, content):
    return {"role": role, "content": content}


def row_of(form, chosen, rejected):
    """A row of each form that data can have, with these responses to the same prompt."""
    replies = {"chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    whole = {side: [turn("user", "hi"), *reply] for side, reply in replies.items()}
    return {
        "hh_rlhf": ("hh_rlhf", {"chosen": HI + chosen, "rejected": HI + rejected}),
        "ultrafeedback": ("ultrafeedback", {"prompt": "hi", **whole, "score_chosen": 9, "score_rejected": 1}),
        "text": ("preference", {"prompt": "hi", "chosen": chosen, "rejected": rejected}),
        "messages": ("preference", {"prompt": [turn("user", "hi")], **replies}),
        "conversations": ("preference", whole),
    }[form]


FORMS = ["hh_rlhf", "ultrafeedback", "text", "messages", "conversations"]


def read_one(tmp_path, form, chosen, rejected):
    format, row = row_of(form, chosen, rejected)
    (read,) = read_rows(str(rows_file(tmp_path / "row.jsonl", [row])), format=format, split="train")
    return read


# Empty responses.


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("blank", ["", " ", "\n\t \r\n", "\u3000\u00a0"])
@pytest.mark.parametrize("form", FORMS)
def test_p7_an_empty_response_is_refused_in_every_form(tmp_path, form, blank, side):
    responses = {"chosen": " yes", "rejected": " no", side: blank}
    row = read_one(tmp_path, form, **responses)
    assert isinstance(row, BadRow) and row.reason == f"empty {side} response"


@pytest.mark.parametrize(("chosen", "rejected"), [("A cat", "A cat sat"), ("A cat sat", "A cat"), ("A", "A cat")])
def test_p7_where_one_text_begins_the_other_both_keep_a_response_or_the_row_is_refused(tmp_path, chosen, rejected):
    """Without an explicit prompt: the whole of the shorter text must not become the prompt."""
    path = rows_file(tmp_path / "row.jsonl", [{"chosen": chosen, "rejected": rejected}])
    (row,) = read_rows(str(path), format="preference", split="train")
    if isinstance(row, BadRow):
        assert chosen == "A" and "share no first word" in row.reason
    else:
        assert (row.prompt + row.chosen, row.prompt + row.rejected) == (chosen, rejected)
        assert row.prompt.strip() and row.chosen.strip() and row.rejected.strip()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("chosen", "rejected"), [(" yes", " yes sir"), (" yes sir", " yes")])
def test_a_response_that_begins_the_other_keeps_its_own_tokens(tmp_path, form, chosen, rejected):
    pair = read_one(tmp_path, form, chosen, rejected)
    assert isinstance(pair, Pair) and (pair.chosen, pair.rejected) == (chosen, rejected)
    tokenizer = load_tokenizer(str(toy.byte_level_tokenizer(tmp_path / "t", chat_template=toy.ZEPHYR)))
    (tokens,) = PairEncoder(tokenizer, augmentation_prompt=P).encode([pair])
    for text, ids in ((chosen, tokens.chosen), (rejected, tokens.rejected)):
        assert ids[-1] == EOS and EOS not in ids[:-1] and tokenizer.decode(ids[:-1]) == text


@pytest.mark.faults
def test_p7_a_response_that_begins_the_other_is_never_scored_as_nothing(world, tmp_path):
    """Each gets the log-prob that it has beside a response that has nothing to do with it."""
    model = world[0]
    apart = [(" yes", " no"), (" yes sir", " no")]
    pairs = [*apart, (" yes", " yes sir"), (" yes sir", " yes")]
    rows = [{"prompt": "Is it?", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    path = written(tmp_path, raw_config(tmp_path, model, rows_file(tmp_path / "rows.jsonl", rows)))
    assert main(["score", path, "--output", str(tmp_path / "scores.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for kind in ("", "_augmented"):
        alone = {text: lines[number][f"logp_chosen{kind}"] for number, (text, _) in enumerate(apart)}
        assert all(value < -math.log(2) for value in alone.values()) and len(set(alone.values())) == 2
        for line, (chosen, rejected) in zip(lines[2:], pairs[2:], strict=True):
            assert line[f"logp_chosen{kind}"] == pytest.approx(alone[chosen], abs=1e-4)
            assert line[f"logp_rejected{kind}"] == pytest.approx(alone[rejected], abs=1e-4)


# Long prompts and responses.

MAX_LENGTH, MAX_PROMPT_LENGTH = 9, 5
LONG_P = " ".join("abcdefghijklmnop")


@pytest.mark.parametrize("end", ["keep_end", "keep_start"])
def test_p7_lengths_around_every_boundary(tmp_path, end):
    """All prompts of 1 to 11 words with all responses of 1 to 11, BOS and EOS counted besides: what is cut, by hand.

    x has the same tokens with p and without, p is whole though longer than any limit, and no response loses its last
    token.
    """
    sizes = list(itertools.product(range(1, 12), range(1, 12), (1, 4, 11)))
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {"prompt": " ".join(letters[:x]), "chosen": " ".join(letters[:y]), "rejected": " ".join(letters[13 : 13 + z])}
        for x, y, z in sizes
    ]
    source = Source(str(rows_file(tmp_path / "rows.jsonl", rows)))
    tokenizer = load_tokenizer(str(toy.word_tokenizer(tmp_path / "words", WORDS, bos=True)))
    plain, augmented = (
        prepare(
            [source],
            tokenizer,
            format="preference",
            split="train",
            augmentation_prompt=p,
            max_length=MAX_LENGTH,
            max_prompt_length=MAX_PROMPT_LENGTH,
            prompt_truncation=end,
            max_bad_rows=0,
            cache_dir=tmp_path / "cache",
        )
        for p in (None, LONG_P)
    )
    np.testing.assert_array_equal(plain.tokens, augmented.tokens)
    np.testing.assert_array_equal(plain.offsets, augmented.offsets)
    assert plain.augmentation.size == 0 and augmented.augmentation.tolist() == list(range(3, 19))
    cut_prompts = cut_responses = 0
    for index, (x, y, z) in enumerate(sizes):
        prompt, chosen, rejected = (part.tolist() for part in plain.pair(index))
        whole = [1, *range(3, 3 + x)], [*range(3, 3 + y), EOS], [*range(16, 16 + z), EOS]
        longest = max(y, z) + 1
        expected = list(whole)
        if x + 1 + longest > MAX_LENGTH and x + 1 > MAX_PROMPT_LENGTH:
            kept = MAX_PROMPT_LENGTH - 1
            expected[0] = [1, *(whole[0][-kept:] if end == "keep_end" else whole[0][1 : 1 + kept])]
            cut_prompts += 1
        if len(expected[0]) + longest > MAX_LENGTH:
            room = MAX_LENGTH - MAX_PROMPT_LENGTH
            expected[1:] = whole[1][:room], whole[2][:room]
            cut_responses += expected[1:] != list(whole[1:])
        assert [prompt, chosen, rejected] == expected, (x, y, z)
        assert len(chosen) >= 1 and len(rejected) >= 1
        assert len(prompt) + max(len(chosen), len(rejected)) <= MAX_LENGTH
    assert (plain.report.truncated_prompts, plain.report.truncated_responses) == (cut_prompts, cut_responses)
    assert cut_prompts > 50 and cut_responses > 50


# Equal and repeated pairs.


@pytest.mark.faults
def test_p7_equal_responses_and_repeated_pairs_are_counted_and_said(world, tmp_path, caplog):
    """They train, to no effect or twice; the log says how many there are, and so does the manifest."""
    good = [json.loads(line) for line in world[1].read_text(encoding="utf-8").splitlines()]
    alike = [{**row, "id": f"alike {number}", "rejected": row["chosen"]} for number, row in enumerate(good[:5])]
    again = [{**row, "id": f"again {number}"} for number, row in enumerate(good[:3])]
    data = rows_file(tmp_path / "rows.jsonl", [*good, *alike, *again, alike[0]])
    with caplog.at_level(logging.INFO):
        assert train(make_config(tmp_path, world[0], data, train={"max_steps": 2})) == 0
    assert "5 pairs of two equal responses" not in caplog.text, "one of them is there twice"
    assert "57 pairs of 57 rows" in caplog.text
    assert "6 pairs of two equal responses, 4 that came before" in caplog.text
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["identical_pairs"], manifest["duplicate_pairs"], manifest["bad_rows"]) == (6, 4, 0)


@pytest.mark.faults
def test_p5_pairs_of_equal_responses_train_nothing(world, tmp_path):
    """A whole step of them: the loss is ln 2 and its gradient nothing, beside that of pairs which differ."""
    good = [json.loads(line) for line in world[1].read_text(encoding="utf-8").splitlines()]
    alike = [{**row, "rejected": row["chosen"]} for row in good]
    norms = []
    for name, data in (("good", world[1]), ("alike", rows_file(tmp_path / "alike.jsonl", alike))):
        config = make_config(tmp_path / name, world[0], data, train={"max_steps": 1})
        assert train(config) == 0
        (line,) = metrics_of(config.output_dir)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        norms.append(line["grad_norm"])
    assert norms[1] < 1e-5 * norms[0]


# Tokenizers that are not the model's.


@pytest.mark.faults
def test_p7_a_swapped_tokenizer_is_refused(world, tmp_path, capsys):
    """With ids beyond the embedding before any start; with other ids for the same text where the run goes on."""
    model = shutil.copytree(world[0], tmp_path / "model")
    path = written(tmp_path, raw_config(tmp_path, model, world[1], train={"max_steps": 1}))
    assert main(["train", path]) == 0
    digest = json.loads((tmp_path / "run" / "manifest.json").read_text())["digests"]["tokenizer"]
    assert digest == tokenizer_digest(load_tokenizer(str(model)))
    capsys.readouterr()
    other = ["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich " * 3]
    toy.byte_level_tokenizer(model, vocabulary_tokens=310, texts=other)
    assert main(["train", path, "train.max_steps=2"]) == 2
    said = capsys.readouterr().err
    assert f"tokenizer: {digest[:16]} -> {tokenizer_digest(load_tokenizer(str(model)))[:16]}" in said
    assert "data.path: " in said and "--allow-change tokenizer" in said
    larger = [f"{first}{second}{third}" for first, second, third in itertools.product("abcdef", repeat=3)]
    toy.byte_level_tokenizer(model, vocabulary_tokens=400, texts=larger)
    assert main(["train", path, f"output_dir={tmp_path / 'other'}"]) == 2
    said = capsys.readouterr().err
    assert "config.json says vocab_size=320; use the tokenizer that belongs to the model" in said
    assert not (tmp_path / "other").exists()


# Pad and EOS.


def test_the_end_of_sequence_receives_gradient_where_it_is_the_padding_too(tmp_path):
    """By hand: at the position before EOS the gradient is W[EOS] − Σ softmax · W, and what fills rows up gets none."""
    tokenizer = load_tokenizer(str(toy.byte_level_tokenizer(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    (tokens,) = PairEncoder(tokenizer, augmentation_prompt=None).encode([Pair("0", "f", 1, "Is it?", " yes", " no")])
    pair = tuple(np.array(ids, np.int32) for ids in (tokens.prompt, tokens.chosen, tokens.rejected))
    rows = tiny.pack([pair], [0], micro_batches=1, rows=1, row_length=40, scored=16)
    rows = jax.tree.map(lambda array: jnp.asarray(array[0]), rows)
    assert (np.asarray(rows.tokens)[0, sum(map(len, pair)) :] == EOS).all(), "rows are filled up with the same id"
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(1, 40, 6)).astype(np.float32), rng.normal(size=(320, 6)).astype(np.float32)

    def total(states):
        sums = response_logprobs(states, jnp.asarray(matrix), rows, pairs=1, cap=None)
        return sums.logprobs.sum(), sums.tokens

    (_, counts), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(hidden))
    assert counts.tolist() == [[len(tokens.chosen), len(tokens.rejected)]], "EOS is counted"
    rejected, prompt, chosen = len(tokens.rejected), len(tokens.prompt), len(tokens.chosen)
    # [rejected, reversed | prompt | chosen]: the last letter of each response predicts its EOS.
    for place in (1, rejected + prompt + chosen - 2):
        logits = matrix @ hidden[0, place]
        softmax = np.exp(logits - logits.max())
        expected = matrix[EOS] - (softmax / softmax.sum()) @ matrix
        np.testing.assert_allclose(gradient[0, place], expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected).max() > 0.1
    for nothing in (0, rejected + prompt + chosen - 1, *range(rejected + prompt + chosen, 40)):
        assert not np.asarray(gradient[0, nothing]).any()


# Weights.


def with_weights(root, **change):
    """A directory whose weights are whole, but for what `change` puts in place of a tensor."""
    path = model_directory(root)
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    tiny.save_weights(model.params(), directory, model.abstract, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, value in change.items():
        tensors[name.replace("__", ".")][:] = value
    save_file(tensors, file)
    return path


@pytest.mark.faults
@pytest.mark.parametrize("command", ["score", "eval", "train"])
def test_p7_weights_that_are_no_numbers_are_refused_by_file_and_tensor(world, tmp_path, capsys, command):
    model = with_weights(tmp_path / "model", embed_out__weight=np.nan)
    raw = raw_config(tmp_path, model, world[1], model={"init": "pretrained"}, data={"eval_path": str(world[1])})
    path = written(tmp_path, raw)
    output = ["--output", str(tmp_path / "scores.jsonl")] if command == "score" else []
    assert main([command, path, *output]) == 2
    said = capsys.readouterr().err
    assert f"{model / 'model.safetensors'}: embed_out.weight holds numbers that are not finite" in said
    assert "choose another model.path" in said and "Traceback" not in said
    assert not (tmp_path / "scores.jsonl").exists() and not (tmp_path / "run" / "checkpoints" / "6").exists()


@pytest.mark.faults
def test_p7_log_probabilities_that_overflow_are_refused_by_file_and_line(world, tmp_path, capsys):
    """Finite weights so large that the hidden states are not: each command says what to change."""
    model = with_weights(tmp_path / "model", gpt_neox__final_layer_norm__weight=3e38)
    raw = raw_config(tmp_path, model, world[1], model={"init": "pretrained"}, data={"eval_path": str(world[1])})
    path = written(tmp_path, raw)
    assert main(["score", path, "--output", str(tmp_path / "scores.jsonl")]) == 2
    said = capsys.readouterr().err
    assert f"48 of 48 pairs, first {world[1]}:1, have no finite log-prob" in said
    assert f"model.path={model}" in said and "model.dtype=float32" in said
    for command in ("eval", "train"):
        assert main([command, path]) == 2
        said = capsys.readouterr().err
        assert "the reference, model.path, gives 48 of 48 pairs a log-prob of NaN" in said
        assert "Traceback" not in said
    assert main(["eval", path, "objective.name=sft", "objective.lam=null"]) == 2
    assert "have no finite log-prob" in capsys.readouterr().err


# Clocks, meshes and shapes.


@pytest.mark.faults
def test_p2_a_clock_that_goes_backwards_changes_nothing(world, tmp_path, monkeypatch):
    """Every reading is an hour before the last: the same steps stay, the newest is the highest, times are times."""
    golden = make_config(tmp_path / "golden", *world, checkpoint={"every_steps": 2, "keep": 2})
    assert train(golden) == 0
    now = itertools.count(time.time(), -3600)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: next(now))
        config = make_config(tmp_path / "skewed", *world, checkpoint={"every_steps": 2, "keep": 2})
        for steps in (3, None):
            stopped = make_config(
                tmp_path / "skewed",
                *world,
                checkpoint={"every_steps": 2, "keep": 2},
                train={"max_steps": steps},
            )
            assert train(stopped) == 0
    assert verified_steps(config.output_dir) == [4, 6] == verified_steps(golden.output_dir)
    ours, theirs = state_of(config.output_dir), state_of(golden.output_dir)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    lines = metrics_of(config.output_dir)
    assert without_times(lines) == without_times(metrics_of(golden.output_dir))
    assert all(0 < line["step_time_s"] < 600 and line["pairs_per_second"] > 0 for line in lines)


@pytest.mark.faults
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"replica": 8}])
def test_p4_a_run_goes_on_on_another_mesh(world, tmp_path, caplog, sizes):
    """Three steps on fsdp 8, three on the other: the pairs of the undisturbed run, its numbers to float order."""
    golden = make_config(tmp_path / "golden", *world)
    assert train(golden) == 0
    assert train(make_config(tmp_path / "moved", *world, train={"max_steps": 3})) == 0
    mesh = {"replica": 1, "fsdp": 1, "tensor": 1} | sizes
    moved = make_config(tmp_path / "moved", *world, mesh=mesh)
    caplog.clear()
    assert train(moved) == 0
    assert "  mesh: " in caplog.text and "the numbers are so up to float order" in caplog.text
    for ours, theirs in zip(metrics_of(moved.output_dir), metrics_of(golden.output_dir), strict=True):
        for name in ("loss", "margin", "logps/chosen", "augmented/margin", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
    ours, theirs = state_of(moved.output_dir), state_of(golden.output_dir)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.faults
@pytest.mark.usefixtures("programs_anew")
def test_p7_nothing_compiles_after_the_first_step_and_another_shape_is_an_error(world, tmp_path, monkeypatch):
    """No model compiles again once step 1 is on its way, and nothing at all after the first evaluation and checkpoint.

    Those two need small programs of their own: means over pairs, and Orbax's slices of arrays that devices hold alike.
    """
    events, reached = [], [0]

    def listen(event, seconds, fun_name="", **_):
        if reached[-1] and event.startswith("/jax/core/compile"):
            events.append((reached[-1], fun_name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    add, prepare_run = loop.StepLog.add, loop.prepare

    def watched(self, step, host_step, metrics):
        add(self, step, host_step, metrics)
        reached.append(step)

    def tried(*arguments, **options):
        job, state = prepare_run(*arguments, **options)
        batch = next(job.feed.batches(0))[1]
        longer = jax.tree.map(lambda array: jnp.concatenate([array, array], axis=-1), batch)
        with pytest.raises(TypeError, match="compiled"):
            job.train_step(state, job.base, job.reference_params, longer)
        return job, state

    monkeypatch.setattr(loop.StepLog, "add", watched)
    monkeypatch.setattr(loop, "prepare", tried)
    data = preference_file(tmp_path / "varied.jsonl", 64, seed=5)
    sections = {"data": {"eval_path": str(world[1])}, "checkpoint": {"every_steps": 2}}
    config = make_config(tmp_path, world[0], data, train={"eval_every_steps": 1}, **sections)
    try:
        assert train(config) == 0
        counted = list(events)
        jax.jit(lambda x: x * 3.25 + 1)(np.float32(len(counted)))
        assert len(events) > len(counted), "the count can see compilations"
    finally:
        reached.append(0)
    assert [line["step"] for line in metrics_of(config.output_dir) if "loss" in line] == list(range(1, 9))
    assert [name for _, name in counted if "step" in name or "scores" in name] == []
    assert [(step, name) for step, name in counted if step > 2] == []
