"""Tests the report: reading of whole, damaged, killed and resumed runs, its numbers, and the page in a browser."""

import html
import json
import math
import re
import shutil

import browser
import numpy as np
import pytest
import yaml
from runs import metrics_of, model_directory, preference_file, raw_config
from synthetic_runs import make_run, make_sft_run

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.report import figures, tables
from sr_dpo_jax.commands.report.page import SECTIONS
from sr_dpo_jax.commands.report.read import read_runs, series

PICTURES = [picture for pictures in SECTIONS.values() for picture in pictures]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Makes a run of SFT and four preference runs, and the file of held-out pairs that their texts come from."""
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sr_dpo_jax.commands.correlation.RESAMPLES", 20)
        for number, name in enumerate(("dpo", "sr_dpo", "ipo", "sr_ipo")):
            make_run(root, name, name, steps=40, seed=number, skill=1 + number / 4)
    make_sft_run(root, "sft", steps=40)
    rows = [
        {"id": f"prompt-{n:04d}", "prompt": "<script>alert(1)</script>", "chosen": "a <b>", "rejected": "secret & c"}
        for n in range(300)
    ]
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def page_of(directories, tmp_path, *options) -> str:
    output = tmp_path / "page.html"
    assert main(["report", *map(str, directories), "--output", str(output), *options]) == 0
    return output.read_text(encoding="utf-8")


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / run.name)


def test_the_page_holds_every_figure_and_nothing_from_elsewhere(world, tmp_path):
    names = ["sft", "dpo", "sr_dpo", "ipo", "sr_ipo"]
    page = page_of([world / name for name in names], tmp_path)
    for picture in PICTURES:
        assert re.search(rf'id="{picture.name}".*?<img src="data:image/svg', page, re.DOTALL), picture.name
        assert html.escape(picture.caption, quote=True)[:40] in page.replace("&#39;", "&#x27;")
    assert "<script" not in page and "not shown" not in page and 'id="problems"' not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,20})|url\(([^)]{0,20})', page)
    assert sources and all(source.startswith("data:image/") for source, _ in sources)
    assert page == page_of([world / name for name in names], tmp_path), "the same runs, the same bytes"


def test_final_metrics_are_those_of_the_files(world):
    runs = read_runs([world / "dpo", world / "sr_dpo", world / "sft"])
    table = tables.final_metrics(runs)
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    for run, row in zip(runs[:2], rows, strict=False):
        found = json.loads((run.path / "eval.json").read_text())
        assert row["loss"] == f"{found['eval/loss']:.3f}" and row["step"] == "40"
        share = found["eval/rewards/accuracies"]
        wilson = [  # the formula, not the library
            (share + 1.96**2 / 600 + sign * 1.96 * np.sqrt(share * (1 - share) / 300 + 1.96**2 / 360000))
            / (1 + 1.96**2 / 300)
            for sign in (-1, 1)
        ]
        assert row["accuracy"] == f"{share:.3f} [{wilson[0]:.3f}, {wilson[1]:.3f}]"
        assert row["Kendall"].startswith(f"{found['eval/margin/kendall']:.2f} [")
    pairs = [json.loads(line) for line in (world / "sr_dpo" / "eval_pairs.jsonl").read_text().splitlines()]
    shift = np.mean([abs(0.3 * 0.1 * pair["augmented_margin"]) for pair in pairs])
    expected = shift / np.mean([abs(0.1 * pair["margin"]) for pair in pairs])
    assert (rows[0]["λΔ / βm"], rows[1]["λΔ / βm"]) == ("–", f"{expected:.3f}")
    assert rows[2]["loss"] == "66.000" and rows[2]["accuracy"] == "–"


def test_the_share_in_sr_ipo_is_of_m_itself(world):
    (run,) = read_runs([world / "sr_ipo"])
    m, augmented = run.column("margin"), run.column("augmented_margin")
    assert tables.shift_share(run) == pytest.approx(0.5 * 0.1 * np.abs(augmented).mean() / np.abs(m).mean())


def test_tables_copy_into_a_paper():
    table = tables.Table(["run", "λΔ / βm"], [["a|b_c", "0.5 [−0.1, 1]"], ["100%", "–"]])
    assert table.markdown().splitlines() == [
        "| run | λΔ / βm |",
        "| --- | ---: |",
        "| a\\|b_c | 0.5 [−0.1, 1] |",
        "| 100% | – |",
    ]
    assert table.latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"run & $\lambda$$\Delta$ / $\beta$m \\",
        r"\midrule",
        r"a\textbar{}b\_c & 0.5 [$-$0.1, 1] \\",
        r"100\% & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_the_headline_says_what_chance_may_explain(world):
    runs = read_runs([world / "dpo", world / "sr_dpo"])
    first, second = tables.headline(runs)
    right = {run.label: run.column("margin") > 0 for run in runs}
    best = max(right, key=lambda label: right[label].mean())
    other = next(label for label in right if label != best)
    assert first.startswith(f"{best} prefers the chosen response in {100 * right[best].mean():.1f} % of 300")
    won, lost = ((right[a] & ~right[b]).sum() for a, b in ((best, other), (other, best)))
    assert won > lost
    tail = sum(math.comb(won + lost, k) for k in range(won, won + lost + 1)) / 2.0 ** (won + lost)
    assert second.startswith(f"{other}: {100 * (won - lost) / 300:.1f} points less; of the {won + lost} pairs")
    assert f"loses {won}, p = {min(1, 2 * tail):.3f}" in second
    assert ("chance may explain it" in second) == (2 * tail > 0.05)


def test_a_running_mean_is_the_mean_of_what_is_there():
    values = np.array([1.0, np.nan, 3, np.inf, 8, 2])
    finite = [[v for v in values[max(0, n - 1) : n + 2] if np.isfinite(v)] for n in range(6)]
    np.testing.assert_allclose(figures.running_mean(values, 3), [np.mean(part) for part in finite])
    assert np.isnan(figures.running_mean(np.array([np.nan, 1]), 1)[0]) and figures.running_mean(values, 1)[4] == 8


def test_what_is_damaged_or_missing_is_named_and_the_rest_is_shown(world, tmp_path, caplog):
    run = copy_of(world / "sr_dpo", tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[4] = "not json\n"
    lines[7] = '{"loss": 1.0}\n'
    lines[9] = json.dumps({**json.loads(lines[9]), "loss": "nan"}) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "lo')
    (run / "eval.json").write_text("[]")
    (run / "skipped.jsonl").write_text('{"step": 10}\n')
    gone = copy_of(world / "dpo", tmp_path)
    for name in ("config.yaml", "eval.json", "eval_pairs.jsonl"):
        (gone / name).unlink()
    page, said = html.unescape(page_of([run, gone], tmp_path)), caplog.text
    for problem in (
        "metrics.jsonl: 3 of 43 lines are damaged and left out (line 5, 8, 43); the last one was cut short",
        "the loss of 1 step(s), the first of them 10, is not finite",
        "eval.json is damaged",
        "1 step(s) were skipped",
        "config.yaml is missing: objective, β and λ are not known",
        f"`sr-dpo eval {gone}/config.yaml` writes them",
    ):
        assert problem in page and problem in said, problem
    steps, loss = series(read_runs([run])[0].steps, "loss")
    assert len(steps) == 38 and np.isnan(loss[list(steps).index(10)])


def test_a_resumed_run_shows_the_later_of_two_lines(world, tmp_path):
    run = copy_of(world / "dpo", tmp_path)
    again = [{"step": step, "loss": 9.0 + step} for step in (38, 39, 40, 41)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    (found,) = read_runs([run])
    steps, loss = series(found.steps, "loss")
    assert list(steps) == list(range(1, 42)) and list(loss[-4:]) == [47, 48, 49, 50]
    assert len(found.evaluations) == 2, "evaluations of the same steps stand"
    assert any("3 step(s) from 38 to 40 stand there more than once" in problem for problem in found.problems)
    assert any("eval.json is of step 40, metrics.jsonl ends at step 41" in problem for problem in found.problems)


def test_names_and_texts_are_escaped_and_texts_are_shown_on_request_alone(world, tmp_path):
    odd = shutil.copytree(world / "sr_dpo", tmp_path / "_<b>$x$ & 'y'")
    page = page_of([odd, world / "dpo"], tmp_path)
    assert "_<b>" not in page and "secret" not in page and "_&lt;b&gt;$x$ &amp; " in page
    shown = page_of([odd, world / "dpo"], tmp_path, "--with-texts")
    assert "<script" not in shown and "&lt;script&gt;alert(1)" in shown and "secret &amp; c" in shown


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Makes two runs with three held-out sets each, a best evaluation and samples."""
    root = tmp_path_factory.mktemp("several")
    preference_file(root / "held_out.jsonl", 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sr_dpo_jax.commands.correlation.RESAMPLES", 20)
        return [
            make_run(root, name, name, steps=60, seed=seed, sets=("harmless", "helpful-online"))
            for seed, name in enumerate(("dpo", "sr_dpo"))
        ]


def test_held_out_sets_stand_side_by_side_and_the_best_is_marked(several, world, tmp_path):
    page = page_of(several, tmp_path)
    assert 'id="held-out-sets"' in page and 'id="held-out-sets"' not in page_of([world / "dpo"], tmp_path)
    runs = read_runs(several)
    table = tables.held_out_sets(runs)
    assert [row[1] for row in table.rows] == ["data.eval_path", "harmless", "helpful-online"] * 2
    last = [line for line in metrics_of(several[1]) if "eval/loss" in line][-1]
    row = dict(zip(table.head, table.rows[4], strict=True))
    assert (row["run"], row["pairs"], row["loss"]) == ("sr_dpo", "80", f"{last['eval/harmless/loss']:.3f}")
    assert row["accuracy"].startswith(f"{last['eval/harmless/rewards/accuracies']:.3f} [")
    for run in runs:
        values = {line["step"]: line["eval/rewards/accuracies"] for line in run.evaluations}
        assert run.best_step == 40 == max(values, key=values.get)
        final = tables.final_metrics([run])
        row = dict(zip(final.head, final.rows[0], strict=True))
        assert row["best"] == f"{values[40]:.3f} (step 40)" and "held-out set" not in row


def test_a_run_with_named_sets_alone_shows_its_first(several, tmp_path):
    run = copy_of(several[0], tmp_path)
    lines = [
        {
            name: value
            for name, value in line.items()
            if not name.startswith("eval/") or name.count("/") > 2 or "h" in name
        }
        for line in metrics_of(run)
    ]
    lines = [{name: line[name] for name in line if not name.startswith(("eval/re", "eval/aug"))} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines[-1].pop("loss", None)
    (run / "eval.json").write_text(json.dumps(lines[-1]))
    (run / "eval_pairs.jsonl").rename(run / "eval_pairs_harmless.jsonl")
    (found,) = read_runs([run])
    assert (found.sets, found.shown_set) == (["eval/harmless", "eval/helpful-online"], "eval/harmless")
    assert found.final()["eval/loss"] == lines[-1]["eval/harmless/loss"] and len(found.pairs) == 300
    final = tables.final_metrics([found])
    assert dict(zip(final.head, final.rows[0], strict=True))["held-out set"] == "harmless"


def test_sample_completions_are_shown_on_request_alone(several, tmp_path):
    damaged = copy_of(several[0], tmp_path)
    with (damaged / "samples.jsonl").open("a") as file:
        file.write('{"step": 60, "set": "eval"}\n{"step"')
    without = page_of([damaged, several[1]], tmp_path)
    assert "36 responses are in samples.jsonl" in without and "says at step" not in without
    assert "samples.jsonl: 2 of 20 lines are damaged" in without
    shown = page_of([damaged, several[1]], tmp_path, "--with-texts")
    assert "&lt;i&gt;sr_dpo&lt;/i&gt; says at step 60 that it is number 2." in shown and "<i>" not in shown
    newest = shown.index("dpo&lt;/i&gt; says at step 60")
    assert newest < shown.index("dpo&lt;/i&gt; says at step 50") and "Which question is number 2?" in shown


def test_runs_of_one_name_get_longer_labels(world, tmp_path):
    other = shutil.copytree(world / "dpo", tmp_path / "dpo")
    assert [run.label for run in read_runs([world / "dpo", other])] == [f"{world.name}/dpo", f"{tmp_path.name}/dpo"]


def test_the_config_difference_holds_the_keys_that_differ(world):
    table = tables.config_difference(read_runs([world / "dpo", world / "sr_dpo"]))
    assert table.rows == [
        ["objective.name", "dpo", "sr_dpo"],
        ["objective.lam", "–", "0.3"],
    ]


def test_a_run_that_was_never_evaluated_leaves_gaps_that_are_named(world, tmp_path):
    sft = page_of([world / "sft"], tmp_path)
    assert "no run here has what it needs, margins (preference runs)" in sft and 'id="problems"' not in sft
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(world / "dpo" / "config.yaml", empty)
    page = page_of([empty], tmp_path)
    assert (
        "metrics.jsonl is missing" in page
        and page.count("is not shown") == len(PICTURES)
        and "No pairs are shown" in page
    )


@pytest.mark.parametrize(("make", "reason"), [(True, "is no run directory"), (False, "no such directory")])
def test_what_is_no_run_is_refused(tmp_path, make, reason, capsys):
    path = tmp_path / "thing"
    if make:
        path.mkdir()
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_an_output_that_cannot_be_written_is_refused_and_a_run_named_twice_too(world, tmp_path, capsys):
    assert main(["report", str(world / "dpo"), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert main(["report", str(world / "dpo"), str(world / "dpo"), "--output", str(tmp_path / "page.html")]) == 2
    assert "named twice" in capsys.readouterr().err


@pytest.mark.skipif(browser.CHROMIUM is None, reason="NO CHROMIUM FOUND: the page was not opened in a browser")
def test_the_page_in_a_browser(world, tmp_path):
    """Every figure decodes, and the page asks for nothing, logs nothing and fits the window; a bad one does not."""
    page_of([world / name for name in ("sft", "dpo", "sr_dpo", "ipo", "sr_ipo")], tmp_path)
    seen = browser.look_at(tmp_path / "page.html", tmp_path)
    assert seen.requests == [] and seen.console == []
    assert seen.images.keys() >= {picture.title for picture in PICTURES} and min(seen.images.values()) > 300
    assert seen.width <= 1220
    picture = browser.picture(tmp_path / "page.html", tmp_path, height=4800)
    assert picture.stat().st_size > 100_000
    bad = tmp_path / "bad.html"
    bad.write_text('<head></head><img alt="x" src="http://elsewhere.invalid/x.png"><script>undefined_name()</script>')
    seen = browser.look_at(bad, tmp_path)
    assert seen.requests == ["http://elsewhere.invalid/x.png"] and seen.console and "x" not in seen.images


@pytest.mark.slow
def test_real_runs(tmp_path):
    """Trains and evaluates DPO, IPO and Sr-DPO on a tiny model, and compares them by the numbers of their own files."""
    data, held_out = preference_file(tmp_path / "train.jsonl", 24), preference_file(tmp_path / "held_out.jsonl", 13)
    model = model_directory(tmp_path / "model")
    for name in ("dpo", "ipo", "sr_dpo"):
        sections = {"objective": {"name": name, "lam": 0.5 if name == "sr_dpo" else None}}
        raw = raw_config(tmp_path, model, data, data={"eval_path": str(held_out)}, **sections)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / name)}))
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        assert main(["eval", str(tmp_path / name / "config.yaml")]) == 0, "as a run writes it"
    directories = [tmp_path / name for name in ("dpo", "ipo", "sr_dpo")]
    page = page_of(directories, tmp_path)
    assert 'id="problems"' not in page
    assert page.count("is not shown") == 2, "the data has no ratings"
    runs = read_runs(directories)
    for run in runs:
        assert len(run.pairs) == 13 and run.last_step == 3
        last = metrics_of(run.path)[-1]
        assert run.column("margin").mean() == pytest.approx(last["eval/margin"], abs=1e-4)
