"""Whole runs on conversations whose system prompts differ, under a template that trims messages."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import toy_tokenizers as toy
from runs import make_config, make_pairs, metrics_of, model_directory, raw_config, tiny_setup, without_times, written

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.compile.programs import _longest_scored, first_step
from sr_dpo_jax.data.pipeline import instruction_room
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.identity import identity_of
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.program import plan_training, require_short_rows, work_of
from sr_dpo_jax.train.reference import cache_files

pytestmark = pytest.mark.usefixtures("same_programs")

SYSTEM = (None, "Be kind.", "Answer as a sailor of the old navy would.")
LOW = "Answer badly, please: "
CONTRAST = {"form": "contrast", "judge": "policy", "against": LOW}
LENGTHS = {"data": {"max_length": 192, "max_prompt_length": 160}, "batch": {"row_length": 512, "row_multiple": 8}}


def conversations(path, count, seed, systems=SYSTEM):
    rows = []
    for number, row in enumerate(make_pairs(count, seed)):
        system = systems[number % len(systems)]
        messages = [{"role": "system", "content": system}] if system else []
        space = "\n " if number % 4 == 1 else ""  # which the template trims
        messages.append({"role": "user", "content": space + row["prompt"]})
        replies = {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
        rows.append({"id": f"{number}", "prompt": messages, **replies})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model directory, training file and held-out file."""
    root = tmp_path_factory.mktemp("world")
    model = model_directory(root / "model")
    toy.byte_level_tokenizer(model, vocabulary_tokens=320, chat_template=toy.LLAMA3)
    return model, conversations(root / "train.jsonl", 16, 1), conversations(root / "held_out.jsonl", 7, 2)


def config_of(world, root, **sections):
    model, data, _ = world
    sections = {"train": {"max_steps": 2}, **sections, "cache_dir": str(model.parent / "cache")}
    return make_config(root, model, data, **LENGTHS | {"data": LENGTHS["data"] | sections.pop("data", {})}, **sections)


def run(world, root, **sections):
    config = config_of(world, root, **sections)
    assert train(config) == 0
    return without_times(metrics_of(config.output_dir))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    setup, pairs, _ = tiny_setup(tmp_path_factory.mktemp("made"), *world[:2], **LENGTHS)
    assert len(pairs.head_tokens) == len(pairs) == 16 and len(set(pairs.head_tokens)) == 3
    return setup, pairs


def test_sr_dpo_trains_evaluates_and_goes_on_as_if_it_had_not_stopped(world, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sections = {"data": {"eval_path": str(world[2])}, "train": {"max_steps": 2, "epochs": 2}}
    golden = run(world, tmp_path / "golden", **sections)
    assert golden[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert golden[0]["augmented/margin"] == pytest.approx(0, abs=1e-5)
    assert golden[1]["augmented/margin"] != pytest.approx(0, abs=1e-5)
    assert any("eval/augmented/margin" in line for line in golden)
    said = [record.getMessage() for record in caplog.records]
    assert sum("start with 3 different heads" in line for line in said) == 2, "training and held-out pairs"
    assert sum("p stands in each prompt, as their heads differ: rows with p have" in line for line in said) == 1
    run(world, tmp_path / "again", **sections | {"train": {"max_steps": 1, "epochs": 2}})
    again = run(world, tmp_path / "again", **sections)
    steps = [line for line in again if "loss" in line]
    assert steps == [line for line in golden if "loss" in line]


def scores_of(root, model, data):
    root.mkdir()
    raw = raw_config(root, model, data, **LENGTHS, refinement=CONTRAST)
    assert main(["score", written(root, raw), "--output", str(root / "scores.jsonl")]) == 0
    return {row["id"]: row for row in map(json.loads, (root / "scores.jsonl").read_text().splitlines())}


def test_scores_are_those_of_each_head_s_pairs_apart(world, tmp_path):
    model, data, _ = world
    together, apart = scores_of(tmp_path / "together", model, data), {}
    lines = data.read_text().splitlines()
    for number in range(len(SYSTEM)):
        part = tmp_path / f"part-{number}.jsonl"
        part.write_text("".join(line + "\n" for line in lines[number :: len(SYSTEM)]))
        _, pairs, _ = tiny_setup(tmp_path / f"setup-{number}", model, part, **LENGTHS)
        assert len(pairs.head) and not len(pairs.head_tokens), "one head: once a row"
        apart |= scores_of(tmp_path / f"apart-{number}", model, part)
    assert together.keys() == apart.keys()
    for name in together["0"]:
        if name.startswith("logp"):
            ours, theirs = (np.array([scores[key][name] for key in together]) for scores in (together, apart))
            np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)
    with_p, against = (
        np.array([row[f"logp_chosen_{kind}"] for row in together.values()]) for kind in ("augmented", "against")
    )
    assert np.abs(with_p - against).max() > 1e-2, "two instructions that do the same would prove nothing"


def test_a_contrast_of_two_instructions_by_the_policy_begins_as_the_reference_s(world, tmp_path):
    objective = {"name": "sr_dpo", "lam": 1.0}
    live, frozen = (
        run(world, tmp_path / judge, objective=objective, refinement={**CONTRAST, "judge": judge})
        for judge in ("policy", "reference")
    )
    assert live[0]["refinement"] == pytest.approx(frozen[0]["refinement"], rel=1e-4)
    assert live[0]["loss"] == pytest.approx(frozen[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("p", [" Trimmed:", pytest.param("  ", marks=pytest.mark.slow)])
def test_p_that_cannot_stand_matters_to_those_who_use_it_alone(world, tmp_path, p):
    dpo, refinement = {"name": "dpo", "lam": None}, {"refinement": {"prompt": p}}
    lines = run(world, tmp_path / "dpo", objective=dpo, **refinement)
    assert lines == run(world, tmp_path / "null", objective=dpo, refinement={"prompt": None})
    with pytest.raises(UsageError, match=r"refinement\.prompt"):
        run(world, tmp_path / "sr_dpo", **refinement)
    with pytest.raises(UsageError, match=r"refinement\.prompt.* null|refinement\.prompt=null"):
        run(world, tmp_path / "eval", objective=dpo, data={"eval_path": str(world[2])}, **refinement)


def test_rows_have_room_for_p_in_each_prompt_and_no_more(made):
    setup, pairs = made
    plan, tokens = setup.plan(pairs, ()), len(pairs.augmentation)
    sizes, fullest = pairs.offsets[:, 3] - pairs.offsets[:, 0] + tokens, 0
    for step_pairs, step_rows in zip(plan.pair, plan.row, strict=True):
        fullest = max(fullest, *(sizes[step_pairs[step_rows == row]].sum() for row in range(plan.shape.rows)))
    assert instruction_room(pairs, plan, tokens) == fullest - plan.shape.row_length
    rows = np.arange(plan.shape.rows)
    source = setup.packing.source(pairs, plan, rows, augmented=True)
    length = {source[step].augmented["tokens"].shape[-1] for step in range(len(plan))}
    assert length == {-(-fullest // 8) * 8} and source[0].prefix_tokens == 0


def test_flops_count_p_as_a_part_of_each_prompt(made):
    setup, pairs = made
    arguments = (setup.model.architecture, setup.packing)
    dpo = dataclasses.replace(setup.objective, name="dpo")
    own = work_of(*arguments, setup.objective, pairs, online=False).flops
    own -= work_of(*arguments, dpo, pairs, online=False).flops
    longer = dataclasses.replace(pairs, offsets=pairs.offsets + np.array([0, 1, 1, 1]) * len(pairs.augmentation))
    np.testing.assert_allclose(own, work_of(*arguments, dpo, longer, online=False).flops / 3)


def test_splash_attention_s_limit_knows_the_longer_rows(made, monkeypatch):
    """Of a plain row and one p the limit takes as many tokens as there are, not of a p in each prompt."""
    setup, pairs = made
    plan = setup.plan(pairs, ())
    once = dataclasses.replace(pairs, head_tokens=pairs.head_tokens[:0])
    longest = plan.shape.row_length + len(pairs.augmentation) + 8
    monkeypatch.setattr("sr_dpo_jax.model.kernels.splash.LONGEST_ROW", longest)
    monkeypatch.setattr("sr_dpo_jax.model.kernels.splash.padded_length", lambda tokens: tokens)
    options = {"seed": 0, "epochs": 1, "attention": "splash"}
    for held_out in ([], [once]):
        plan_training(setup.packing.limits, setup.objective, once, held_out, **options)
    for training, held_out in ((pairs, []), (once, [pairs])):
        with pytest.raises(UsageError, match="splash attention takes at most"):
            plan_training(setup.packing.limits, setup.objective, training, held_out, **options)
    dpo = dataclasses.replace(setup.objective, name="dpo")
    plan_training(setup.packing.limits, dpo, pairs, [], **options)
    require_short_rows(setup.packing.limits, longest - 8, 0)


def test_compile_takes_the_longest_rows_with_p_of_all_that_are_scored(made):
    setup, pairs = made
    once = dataclasses.replace(pairs, head_tokens=pairs.head_tokens[:0])
    without = dataclasses.replace(once, augmentation=once.augmentation[:0])
    each, row, none = (
        first_step(setup, of, setup.plan(of, ()), augmented=True).augmented["tokens"].shape[-1]
        for of in (pairs, once, without)
    )
    assert each > row > none
    for training, held_out, expected in ((once, [], row), (once, [pairs], each), (without, [once], row)):
        plan = setup.plan(training, held_out)
        step = first_step(setup, training, plan, augmented=True)
        found = _longest_scored(setup, step, plan, held_out)
        assert found.augmented["tokens"].shape[-1] >= expected
        assert (found is step) == (not held_out)


def test_keys_tell_the_two_layouts_apart(made, tmp_path):
    setup, pairs = made
    once = dataclasses.replace(pairs, head_tokens=pairs.head_tokens[:0])
    moved = dataclasses.replace(pairs, head_tokens=pairs.head_tokens + 1)
    options = {"weights_digest": "w", "dtype": "d", "augmented": True}
    plain, *_ = names = [cache_files(tmp_path, of, **options) for of in (pairs, once, moved)]
    assert {of[0] for of in names} == {plain[0]}, "p is no part of the plain scores"
    assert len({of[1] for of in names}) == 3
    plan, config = setup.plan(pairs, ()), setup.config.model_dump()
    rest = {"tokenizer": "t", "weights_digest": "w", "config": config, "total_steps": 2}
    identities = [identity_of(of, plan, **rest)["refinement.prompt"] for of in (pairs, once, moved)]
    assert len(set(identities)) == 3
