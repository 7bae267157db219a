"""`reference.path`: a frozen reference that is not the model at the start, in whole runs."""

import json
import shutil

import numpy as np
import pytest
from runs import make_config, metrics_of, model_directory, preference_file, raw_config, without_times, written

from sr_dpo_jax.cli import main
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")

CONTRAST = {"form": "contrast", "judge": "reference"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directories of a model and of two references with weights, one of another size, and two files of pairs."""
    root = tmp_path_factory.mktemp("world")
    data = preference_file(root / "train.jsonl", 16, seed=1)
    held_out = preference_file(root / "held_out.jsonl", 5, seed=2)
    made = {}
    for name, fields in {"other": {}, "wide": {"hidden_size": 48, "num_hidden_layers": 1}}.items():
        bare = model_directory(root / f"bare {name}", **fields)
        sections = {"seed": 7, "train": {"max_steps": 1}, "objective": {"name": "sft", "lam": None}}
        config = make_config(root / name, bare, data, **sections)
        assert train(config) == 0
        assert main(["export", config.output_dir, str(root / f"reference {name}")]) == 0
        made[name] = root / f"reference {name}"
    return root / "bare other", made, data, held_out


def config_of(world, root, *, reference="other", mode="cached", **sections):
    model, references, data, held_out = world
    own = {"path": str(references[reference]), "mode": mode}
    sections = {"train": {"max_steps": 2}, "optimizer": {"warmup_steps": 0}, "reference": own, **sections}
    sections["data"] = {"eval_path": str(held_out), **sections.get("data", {})}
    return make_config(root, model, data, **sections)


def scores_of(world, root, path, **sections):
    """The columns that `sr-dpo score` writes of the training pairs under a model, or of the bare one with the seed."""
    model, _, data, _ = world
    root.mkdir(parents=True, exist_ok=True)
    own = {} if path is None else {"model": {"path": str(path), "init": "pretrained"}}
    raw = raw_config(root, model, data, **{**own, **sections})
    assert main(["score", written(root, raw), "--output", str(root / "scores.jsonl")]) == 0
    rows = [json.loads(line) for line in (root / "scores.jsonl").read_text().splitlines()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0] if name.startswith("logp")}


def preference(columns, kind=""):
    return columns[f"logp_chosen{kind}"] - columns[f"logp_rejected{kind}"]


@pytest.mark.parametrize(
    ("reference", "lora"),
    [
        ("wide", None),
        pytest.param("other", None, marks=pytest.mark.slow),
        pytest.param("other", {"rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_margins_at_the_start_are_what_the_two_models_differ_by(world, tmp_path, reference, lora):
    """In training (all pairs in one step) and in both evaluations, also of another architecture, also of adapters."""
    batch = {"pairs_per_step": 16, "row_length": 256}
    config = config_of(world, tmp_path, reference=reference, batch=batch, lora=lora)
    assert train(config) == 0
    first, *_, evaluation = metrics_of(config.output_dir)
    policy, other = scores_of(world, tmp_path / "a", None), scores_of(world, tmp_path / "b", world[1][reference])
    margin, augmented = (preference(policy, kind) - preference(other, kind) for kind in ("", "_augmented"))
    assert np.abs(margin).mean() > 1e-2, "the two models differ"
    assert first["margin"] == pytest.approx(margin.mean(), rel=1e-4, abs=1e-5)
    assert first["augmented/margin"] == pytest.approx(augmented.mean(), rel=1e-4, abs=1e-5)
    expected = np.logaddexp(0, -0.1 * margin + 0.5 * 0.1 * augmented)
    assert first["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    path = written(tmp_path, config.model_dump(mode="json"))
    assert main(["eval", path]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["eval/margin"] == pytest.approx(evaluation["eval/margin"], rel=1e-4, abs=1e-5)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["reference"]["path"] == str(world[1][reference]) and len(manifest["reference"]["digest"]) == 64
    assert manifest["identity"]["reference.path"] == manifest["reference"]["digest"][:16]
    if lora is not None:  # beside weights that are in no file
        return
    assert main(["export", config.output_dir, str(tmp_path / "out")]) == 0
    assert f"| reference | `reference {reference}` |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_cached_and_online_agree_and_another_architecture_cannot_stay(world, tmp_path):
    cached, online = (
        without_times(metrics_of(config.output_dir))
        for config in (config_of(world, tmp_path / mode, mode=mode) for mode in ("cached", "online"))
        if train(config) == 0
    )
    for mine, theirs in zip(cached, online, strict=True):
        for name in ("loss", "margin", "eval/margin"):
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    with pytest.raises(UsageError, match=r"reference.mode=online: the model of reference.path=.*set reference.mode"):
        train(config_of(world, tmp_path / "wide", reference="wide", mode="online"))


def test_the_reference_judges_a_contrast_and_settles_lam(world, tmp_path, monkeypatch, caplog, capsys):
    from sr_dpo_jax.train import knowledge

    monkeypatch.setattr(knowledge, "_slope", lambda contrast: {"value": 1.5, "interval": [1.0, 2.0], "finite": True})
    sections = {"objective": {"name": "sr_dpo", "lam": "auto"}, "refinement": CONTRAST}
    sections["batch"] = {"pairs_per_step": 16, "row_length": 256}
    config = config_of(world, tmp_path, **sections)
    assert train(config) == 0
    other = scores_of(world, tmp_path / "b", world[1]["other"])
    contrast = preference(other, "_augmented") - preference(other)
    first = metrics_of(config.output_dir)[0]
    assert first["refinement"] == pytest.approx(contrast.mean(), abs=1e-5)
    assert "what the reference knows of the labels" in caplog.text
    table = json.loads((tmp_path / "run" / "manifest.json").read_text())["knowledge"]
    assert table["contrast"]["mean"] == pytest.approx(contrast.mean(), abs=1e-5)
    path = written(tmp_path, config.model_dump(mode="json"))
    capsys.readouterr()
    assert main(["score", path, "--knowledge"]) == 0
    assert f"{table['d']['mean']:.3f}" in capsys.readouterr().out
    assert main(["score", path, "--knowledge", "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "reference.path makes the table one of other log-probs" in capsys.readouterr().err


@pytest.mark.slow
def test_another_reference_is_another_run_and_another_key(world, tmp_path):
    config = config_of(world, tmp_path, train={"max_steps": 1})
    assert train(config) == 0
    changed = config_of(world, tmp_path, reference="wide")
    with pytest.raises(UsageError, match=r"(?s)was reached by another run.*reference.path: \w{16} -> \w{16}"):
        train(changed)
    before = len([*(tmp_path / "cache").glob("reference-plain-*")])
    assert train(changed, allowed_changes=["reference.path"]) == 0
    assert len([*(tmp_path / "cache").glob("reference-plain-*")]) == 2 * before


@pytest.mark.slow
def test_the_report_draws_no_loss_at_the_start(world, tmp_path):
    from sr_dpo_jax.commands.report.read import read_runs

    config = config_of(world, tmp_path, train={"max_steps": 1})
    assert train(config) == 0
    assert read_runs([tmp_path / "run"])[0].loss_at_zero is None


def test_what_cannot_be_a_reference_is_refused(world, tmp_path):
    model, references, data, _ = world

    def refused(problem, **sections):
        section = {"path": str(references["other"])} | sections.pop("reference", {})
        with pytest.raises(UsageError, match=problem):
            train(make_config(tmp_path, model, data, reference=section, **sections))

    simpo = {"name": "simpo", "lam": None}
    refused(r"reference.path=.*objective.name=simpo needs no reference", objective=simpo)
    refused(r"reference.path=/nowhere: no such directory", reference={"path": "/nowhere"})
    refused(r"reference.revision=x: pins a hub name", reference={"revision": "x"})
    refused(r"reference.revision=x: pins reference.path", reference={"path": None, "revision": "x"})
    refused(r"would have no base in common; set reference.mode=cached", reference={"mode": "online"}, lora={"rank": 2})
    refused(r"weights", reference={"path": str(model)})
    foreign = tmp_path / "foreign"
    shutil.copytree(references["other"], foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = rf"reference.path={foreign}: its tokenizer .*{model}, which makes the ids"
    refused(named, reference={"path": str(foreign)})
