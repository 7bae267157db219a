"""Forms and judges of Δ in whole runs, against float64 NumPy on the log-probs that `sr-dpo score` writes."""

import json

import jax
import numpy as np
import pytest
from runs import (
    make_config,
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    tiny_setup,
    without_times,
    written,
)
from safetensors.numpy import load_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.scored_set import training_feed

pytestmark = pytest.mark.usefixtures("same_programs")

LOW = "Answer badly, please: "
CONTRAST = {"form": "contrast", "judge": "reference"}


def slow(*values):
    """A case of the slow suite: the quick loop runs another of the same test."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model directory, training file, held-out file and a file with ratings."""
    root = tmp_path_factory.mktemp("world")
    data = preference_file(root / "train.jsonl", 16, seed=1)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rated = root / "rated.jsonl"
    scored = [row | {"score_chosen": 3.0 + number, "score_rejected": 1.5} for number, row in enumerate(rows)]
    rated.write_text("".join(json.dumps(row) + "\n" for row in scored))
    return model_directory(root / "model"), data, preference_file(root / "held_out.jsonl", 5, seed=2), rated


def run(world, root, *, pairs=None, **sections):
    """Trains two steps and gives their metrics; the reference is scored once for all runs."""
    model, usual, _, _ = world
    sections = {"train": {"max_steps": 2}, "optimizer": {"warmup_steps": 0}, **sections}
    config = make_config(root, model, pairs or usual, **{"cache_dir": str(model.parent / "cache"), **sections})
    assert train(config) == 0
    return without_times(metrics_of(config.output_dir))


def scored(world, root, **refinement):
    """The columns that `sr-dpo score` writes, float64 `[N]`."""
    model, data, _, _ = world
    root.mkdir(exist_ok=True)
    raw = raw_config(root, model, data, refinement=refinement)
    assert main(["score", written(root, raw), "--output", str(root / "scores.jsonl")]) == 0
    rows = [json.loads(line) for line in (root / "scores.jsonl").read_text().splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0] if name.startswith("logp")}


def preference(columns, kind=""):
    return columns[f"logp_chosen{kind}"] - columns[f"logp_rejected{kind}"]


def pairs_of_first_step(world, root, **sections):
    model, data, _, _ = world
    setup, pairs, _ = tiny_setup(root / "plan", model, data, **sections)
    return setup.plan(pairs, []).pair[0]


def logistic(logit):
    return np.logaddexp(0, -logit)


@pytest.mark.parametrize("name", [*map(slow, ["sr_dpo", "sr_ipo"]), "sr_ipo_mean"])
def test_contrast_by_the_reference_shifts_by_lam_times_c(world, tmp_path, name):
    lines = run(world, tmp_path, objective={"name": name, "beta": 0.1, "lam": 0.7}, refinement=CONTRAST)
    columns, first = scored(world, tmp_path), pairs_of_first_step(world, tmp_path)
    tokens = np.ones((16, 2))
    if name == "sr_ipo_mean":
        rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
        tokens = np.array([[row["chosen_tokens"], row["rejected_tokens"]] for row in rows])
    sides = [(columns[f"logp_{side}_augmented"] - columns[f"logp_{side}"]) for side in ("chosen", "rejected")]
    contrast = (sides[0] / tokens[:, 0] - sides[1] / tokens[:, 1])[first]
    expected = logistic(-0.7 * contrast) if name == "sr_dpo" else (-0.7 * contrast - 5) ** 2
    assert lines[0]["refinement"] == pytest.approx(contrast.mean(), rel=1e-4, abs=1e-6)
    assert lines[0]["loss"] == pytest.approx(expected.mean(), rel=1e-6)
    assert np.abs(contrast).max() > 1e-3, "a contrast of nothing would prove nothing"
    assert not any("augmented/margin" in line for line in lines), "no rows with p in the step"


def test_the_first_step_in_bfloat16_has_the_loss_of_the_contrast_alone(world, tmp_path):
    """Policy and reference round alike, so margins are 0, and the loss is the mean of −log σ(−λc), to 1e-6.

    c is taken in float64 from the scores that stand in the cache; in float32 they are other ones.
    """
    cache = tmp_path / "cache"
    sections = {"cache_dir": str(cache), "refinement": CONTRAST, "model": {"dtype": "bfloat16"}}
    lines = run(world, tmp_path, objective={"name": "sr_dpo", "lam": 0.7}, **sections)
    plain, with_p = (
        load_file(*cache.glob(f"reference-{kind}-*"))["scores"].astype(np.float64) for kind in ("plain", "augmented")
    )
    contrast = (with_p - plain) @ [1, -1]
    first = contrast[pairs_of_first_step(world, tmp_path)]
    assert lines[0]["margin"] == 0
    assert lines[0]["refinement"] == pytest.approx(first.mean(), rel=1e-6, abs=1e-7)
    assert lines[0]["loss"] == pytest.approx(logistic(-0.7 * first).mean(), rel=1e-6)
    wide = scored(world, tmp_path / "float32")
    in_float32 = preference(wide, "_augmented") - preference(wide)
    assert 1e-4 < np.abs(in_float32 - contrast).max() < 0.1, "the types differ, and mean the same"


def test_contrast_by_the_policy_begins_as_the_references_and_moves(world, tmp_path):
    objective = {"name": "sr_dpo", "lam": 1.0}
    live = run(world, tmp_path / "live", objective=objective, refinement={**CONTRAST, "judge": "policy"})
    frozen = run(world, tmp_path / "frozen", objective=objective, refinement=CONTRAST)
    # Log-probs are tens of nats, so float order alone moves their difference by 1e-6.
    assert live[0]["refinement"] == pytest.approx(frozen[0]["refinement"], rel=1e-5, abs=1e-6)
    assert live[0]["loss"] == pytest.approx(frozen[0]["loss"], rel=1e-6)
    assert live[1]["refinement"] != pytest.approx(frozen[1]["refinement"], rel=1e-5)
    assert live[0]["augmented/margin"] == pytest.approx(0, abs=1e-6), "m̂ of a policy that is still the reference"


@pytest.mark.parametrize("judge", [slow("reference"), "policy"])
def test_contrast_against_a_second_instruction(world, tmp_path, judge):
    refinement = {"form": "contrast", "judge": judge, "against": LOW}
    lines = run(world, tmp_path, objective={"name": "sr_dpo", "lam": 1.0}, refinement=refinement)
    columns = scored(world, tmp_path, against=LOW, form="contrast")
    contrast = (preference(columns, "_augmented") - preference(columns, "_against"))[
        pairs_of_first_step(world, tmp_path)
    ]
    assert lines[0]["refinement"] == pytest.approx(contrast.mean(), rel=1e-4, abs=1e-6)
    assert lines[0]["loss"] == pytest.approx(logistic(-contrast).mean(), rel=1e-6)
    swapped = {"form": "contrast", "prompt": LOW, "against": raw_config(tmp_path, *world[:2])["refinement"]["prompt"]}
    mirrored = scored(world, tmp_path / "mirrored", **swapped)
    np.testing.assert_allclose(preference(mirrored, "_augmented"), preference(columns, "_against"), atol=1e-5)


@pytest.mark.parametrize("mode", [slow("cached"), "online"])
def test_lam_zero_is_the_plain_run(world, tmp_path, mode):
    """To float order: the loss is the plain one bit for bit (test_losses.py), its program another one."""
    plain = {"objective": {"name": "dpo", "lam": None}, "reference": {"mode": mode}}
    zero = {"objective": {"name": "sr_dpo", "lam": 0.0}, "refinement": CONTRAST, "reference": {"mode": mode}}
    theirs = run(world, tmp_path / "plain", **plain)
    ours = run(world, tmp_path / "zero", **zero)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "margin", "grad_norm", "logps/chosen"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_lengths_are_desensitised_in_the_contrast_and_in_the_cache_too(world, tmp_path):
    """Sums are linear in the weight of the tail: Δ for a half is the mean of those for 0 and for 1."""
    found, first = {}, pairs_of_first_step(world, tmp_path)
    for ld_alpha in (0.0, 0.5, None):
        cache, objective = tmp_path / f"cache {ld_alpha}", {"name": "sr_dpo", "lam": 1.0, "ld_alpha": ld_alpha}
        sections = {"cache_dir": str(cache), "refinement": CONTRAST}
        lines = run(world, tmp_path / str(ld_alpha), objective=objective, **sections)
        assert lines[0]["margin"] == pytest.approx(0, abs=1e-5), "policy and reference count alike"
        plain, with_p = (
            load_file(*cache.glob(f"reference-{kind}-*"))["scores"].astype(np.float64)
            for kind in ("plain", "augmented")
        )
        contrast = ((with_p - plain) @ [1, -1])[first]
        assert lines[0]["refinement"] == pytest.approx(contrast.mean(), abs=1e-6)
        assert lines[0]["loss"] == pytest.approx(logistic(-contrast).mean(), rel=1e-6)
        found[ld_alpha] = plain, with_p, lines[0]["logps/chosen"]
    for none, half, whole in zip(*(found[ld_alpha][:2] for ld_alpha in (0.0, 0.5, None)), strict=True):
        np.testing.assert_allclose(half, (none + whole) / 2, rtol=1e-5)
        assert (none >= whole - 1e-4).all() and (none - whole).max() > 10
    assert len({line[2] for line in found.values()}) == 1, "shown whole"


def test_lengths_and_weights_with_a_reference_that_stays_on_the_mesh(world, tmp_path):
    """The numbers of the cached one; with p in the step, and in an evaluation."""
    objective = {"name": "sr_dpo", "lam": 0.5, "ld_alpha": 0.3, "use_weighting": True}
    sections = {"objective": objective, "data": {"eval_path": str(world[2])}}
    cached, online = (
        run(world, tmp_path / mode, **sections, reference={"mode": mode}) for mode in ("cached", "online")
    )
    for mine, other in zip(cached, online, strict=True):
        for name in ("loss", "margin", "refinement", "weight", "grad_norm"):
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert cached[0]["loss"] < 0.95 * np.log(2) and cached[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert 0.3 < cached[-1]["eval/weight"] < 3 and "eval/loss" in cached[-1]
    other = run(world, tmp_path / "whole", **sections | {"objective": objective | {"ld_alpha": None}})
    assert abs(other[1]["margin"] - cached[1]["margin"]) > 1e-4


@pytest.mark.slow
def test_the_table_of_knowledge_counts_lengths_as_the_objective_does(world, tmp_path, capsys):
    sections = {"objective": {"name": "sr_dpo", "lam": 0.5, "ld_alpha": 0.0}, "refinement": CONTRAST}
    path = written(tmp_path, raw_config(tmp_path, *world[:2], **sections))
    assert main(["score", path, "--knowledge", "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "ask for one of them" in capsys.readouterr().err
    assert main(["score", path, "--knowledge"]) == 0
    short = capsys.readouterr().out
    assert main(["score", path, "objective.ld_alpha=null", "--knowledge"]) == 0
    whole = capsys.readouterr().out
    (of_short,), (of_whole,) = (
        [line for line in said.splitlines() if line.startswith("d, ")] for said in (short, whole)
    )
    assert of_short != of_whole


@pytest.mark.parametrize(("offset", "shift"), [("log", np.log), slow("linear", lambda gap: gap)])
def test_ratings_shift_by_their_difference(world, tmp_path, offset, shift):
    refinement = {"judge": "ratings", "alpha": 0.25, **({"offset": offset} if offset != "log" else {})}
    lines = run(world, tmp_path, pairs=world[3], objective={"name": "sr_dpo", "lam": 2.0}, refinement=refinement)
    gap = 0.25 * shift(1.5 + pairs_of_first_step(world, tmp_path))
    assert lines[0]["refinement"] == pytest.approx(gap.mean(), rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(logistic(-2.0 * gap).mean(), rel=1e-5)


def test_ratings_that_are_not_there_are_refused_by_line(world, tmp_path):
    with pytest.raises(UsageError, match=r"16 of 16 pairs have no ratings, first .*train.jsonl:1"):
        run(world, tmp_path, objective={"name": "sr_dpo", "lam": 1.0}, refinement={"judge": "ratings"})


def test_a_log_of_ratings_that_do_not_differ_is_refused_and_linear_takes_them(world, tmp_path):
    rows = [json.loads(line) | {"score_rejected": 3.0} for line in world[3].read_text().splitlines()]
    equal = tmp_path / "equal.jsonl"
    equal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"pairs": equal, "objective": {"name": "sr_dpo", "lam": 1.0}}
    with pytest.raises(UsageError, match=r"1 of 16 .*equal.jsonl:1, .*set refinement.offset=linear"):
        run(world, tmp_path, **sections, refinement={"judge": "ratings"})
    run(world, tmp_path, **sections, refinement={"judge": "ratings", "offset": "linear"})


def test_the_held_out_loss_has_the_held_out_pairs_own_refinement(world, tmp_path):
    model, data, held_out, _ = world
    sections = {
        "objective": {"name": "sr_dpo", "lam": 0.7},
        "refinement": CONTRAST,
        "data": {"eval_path": str(held_out)},
    }
    lines = run(world, tmp_path, **sections)
    raw = raw_config(tmp_path, model, data, **sections)
    assert main(["eval", written(tmp_path, raw)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval_pairs.jsonl").read_text().splitlines()]
    column = {name: np.array([row[name] for row in rows]) for name in rows[0] if "logp" in name or name == "margin"}
    contrast = preference(
        {name.removeprefix("reference_"): column[name] for name in column if "reference" in name}, "_augmented"
    )
    contrast -= preference({name.removeprefix("reference_"): column[name] for name in column if "reference" in name})
    evaluation = next(line for line in lines if "eval/loss" in line)
    assert evaluation["eval/refinement"] == pytest.approx(contrast.mean(), rel=1e-4, abs=1e-6)
    expected = logistic(0.1 * column["margin"] - 0.7 * contrast).mean()
    assert evaluation["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_the_step_costs_what_dpos_costs(world, tmp_path):
    """XLA's own count of the compiled step, within 0.5 %; with the policy as judge it is a third more."""
    flops = {}
    for name, sections in {
        "dpo": {"objective": {"name": "dpo", "lam": None}},
        "reference": {"refinement": CONTRAST},
        "policy": {"refinement": {**CONTRAST, "judge": "policy"}},
    }.items():
        setup, pairs, _ = tiny_setup(tmp_path / name, *world[:2], **sections)
        plan = setup.plan(pairs, [])
        scored_set = setup.scored_set("training", pairs) if setup.objective.judged_before else None
        if scored_set is not None:
            scored_set.reference.scores[:] = 0
        feed = training_feed(setup.packing, setup.objective, pairs, plan, scored_set, online=False)
        program = setup.program(plan)
        batch = next(feed.batches(0))[1]
        if batch.reference is None:
            zeros = jax.numpy.zeros((plan.shape.pairs, 2), jax.numpy.float32)
            augmented = None if batch.augmented is None else zeros
            batch = type(batch)(**{**vars(batch), "reference": zeros, "reference_augmented": augmented})
        flops[name] = program.step.lower(program.state, None, None, batch).compile().cost_analysis()["flops"]
    assert flops["reference"] == pytest.approx(flops["dpo"], rel=5e-3)
    assert flops["policy"] > 1.2 * flops["dpo"]


def test_auto_on_a_model_that_knows_nothing_is_the_plain_run(world, tmp_path, caplog):
    plain = run(world, tmp_path / "plain", objective={"name": "dpo", "lam": None})
    auto = run(world, tmp_path / "auto", objective={"name": "sr_dpo", "lam": "auto"}, refinement=CONTRAST)
    assert auto == plain
    manifest = json.loads((tmp_path / "auto" / "run" / "manifest.json").read_text())
    assert manifest["knowledge"]["lam"] == 0 and manifest["knowledge"]["pairs"] == 16
    assert "what the model at the start knows of the labels" in caplog.text


def test_auto_is_the_slope_and_a_run_that_goes_on_keeps_it(world, tmp_path, monkeypatch):
    from sr_dpo_jax.train import knowledge

    monkeypatch.setattr(knowledge, "_slope", lambda contrast: {"value": 1.5, "interval": [1.0, 2.0], "finite": True})
    sections = {"objective": {"name": "sr_dpo", "lam": "auto"}, "refinement": CONTRAST}
    golden = run(world, tmp_path / "golden", **sections)
    number = run(world, tmp_path / "number", objective={"name": "sr_dpo", "lam": 1.5}, refinement=CONTRAST)
    assert golden == number
    run(world, tmp_path / "again", **sections, train={"max_steps": 1})
    monkeypatch.setattr(knowledge, "_slope", lambda contrast: {"value": 9.0, "interval": [8.0, 10.0], "finite": True})
    assert run(world, tmp_path / "again", **sections) == golden


def test_eval_of_a_run_with_auto_takes_the_lam_that_it_settled(world, tmp_path, monkeypatch):
    from sr_dpo_jax.train import knowledge

    model, data, held_out, _ = world
    sections = {
        "objective": {"name": "sr_dpo", "lam": "auto"},
        "refinement": CONTRAST,
        "data": {"eval_path": str(held_out)},
    }
    path = written(tmp_path, raw_config(tmp_path, model, data, **sections))
    assert main(["eval", path]) == 2, "no run has settled it"
    monkeypatch.setattr(knowledge, "_slope", lambda contrast: {"value": 1.5, "interval": [1.0, 2.0], "finite": True})
    lines = run(world, tmp_path, **sections)
    assert main(["eval", path]) == 0
    evaluation = next(line for line in lines if "eval/loss" in line)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["eval/loss"] == pytest.approx(
        evaluation["eval/loss"]
    )


@pytest.mark.slow
def test_a_weighted_sum_trains_goes_on_and_is_shown(world, tmp_path, monkeypatch):
    """Of a contrast with `lam: auto` and a loss without a margin, and its loss at the start in float64."""
    from sr_dpo_jax.commands.report.page import report
    from sr_dpo_jax.train import knowledge

    monkeypatch.setattr(knowledge, "_slope", lambda contrast: {"value": 1.5, "interval": [1.0, 2.0], "finite": True})
    terms = [{"name": "bco_pair", "weight": 0.25}, {"name": "sr_dpo", "weight": 0.75, "lam": "auto"}]
    sections = {"objective": {"name": "mixed", "lam": None, "terms": terms, "sft_weight": 0.5}, "refinement": CONTRAST}
    sections["data"] = {"eval_path": str(world[2])}
    golden = run(world, tmp_path / "golden", **sections)
    columns, first = scored(world, tmp_path), pairs_of_first_step(world, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    contrast = preference(columns, "_augmented") - preference(columns)
    sft = -columns["logp_chosen"] / [row["chosen_tokens"] for row in rows]
    expected = 0.75 * logistic(-1.5 * contrast) + 0.25 * 2 * np.log(2) + 0.5 * sft
    assert golden[0]["loss"] == pytest.approx(expected[first].mean(), rel=1e-5)
    assert golden[-1].keys() >= {"eval/loss", "eval/refinement", "eval/rewards/margins"}
    run(world, tmp_path / "again", **sections, train={"max_steps": 1})
    assert run(world, tmp_path / "again", **sections)[-1] == golden[-1]
    root = tmp_path / "golden" / "run"
    assert report([root], tmp_path / "report.html", with_texts=False) == 1
    assert main(["export", str(root), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.25 · bco_pair (beta 0.1) + 0.75 · sr_dpo (" in card and "lam auto" in card


def test_score_prints_what_the_model_knows(world, tmp_path, capsys):
    path = written(tmp_path, raw_config(tmp_path, *world[:2]))
    assert main(["score", path]) == 2
    assert "--knowledge" in capsys.readouterr().err
    assert main(["score", path, "--knowledge"]) == 0
    said = capsys.readouterr().out
    assert "c, the contrast" in said and "16 pairs" in said and "the slope of the labels on the contrast is" in said


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"refinement": {"judge": "reference"}}, "the reference's own margin is 0"),
        ({"refinement": {"form": "contrast", "judge": "ratings"}}, "ratings are no log-probs"),
        ({"refinement": {"against": LOW}}, "refinement.against: is a second instruction"),
        ({"refinement": {"form": "contrast", "against": " "}}, "refinement.against: is a second instruction"),
        ({"refinement": {"offset": "linear"}}, "refinement.offset=linear: is for refinement.judge=ratings"),
        ({"refinement": {"alpha": 2.0}}, "refinement.alpha=2.0: is for refinement.judge=ratings"),
        ({"objective": {"lam": "auto"}}, "objective.lam=auto: only a contrast"),
        ({"objective": {"lam": "much"}}, "objective.lam='much': Input should be 'auto'"),
        ({"objective": {"name": "dpo", "lam": None}, "refinement": CONTRAST}, "objective.name=dpo has no refinement"),
        ({"refinement": {**CONTRAST, "prompt": None}}, "refinement.prompt is empty"),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_remedy(world, tmp_path, sections, problem):
    with pytest.raises(UsageError, match=problem):
        config_from_dict(raw_config(tmp_path, *world[:2], **sections), where="test")
