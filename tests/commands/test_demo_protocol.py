"""Tests the demo's protocol end to end in a very small setting, stopped and resumed; its tables; the findings page."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import browser
import numpy as np
import pytest
import warm
from runs import REPOSITORY, metrics_of, start_python

from sr_dpo_jax.commands.demo import results as measured
from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.measure import qualities
from sr_dpo_jax.commands.demo.page import FIGURES, render
from sr_dpo_jax.commands.demo.protocol import (
    FULL,
    LAMBDAS,
    MORE,
    NOISE,
    SHUFFLED,
    SMALL,
    Layout,
    arm_config,
    base_config,
)
from sr_dpo_jax.durable.files import read_lines

WORLD = REPOSITORY / "sr_dpo_jax" / "commands" / "demo"
TINY = {
    "name": "tiny",
    "base_steps": 30,
    "seeds": 2,
    "arms": ["dpo", "sr_dpo-0.5", "dpo-more", "dpo-shuffled", "sr_dpo-0.5-more"],
    "held_out_pairs": 16,
    "more_factor": 2,
    "evaluations": 2,
}


def start(output: Path) -> "subprocess.Popen[str] | warm.Process":
    return start_python([str(REPOSITORY / "tests" / "world_driver.py"), json.dumps(TINY), "64", str(output)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Terminates a demo in its first preference run, and resumes it with the same command."""
    output = tmp_path_factory.mktemp("world") / "demo"
    first = start(output)
    before = ""
    for line in first.stdout:
        before += line
        if re.search(r"seed 0: dpo\b", line):
            break
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 75, before[-3000:] + said[-3000:]
    assert not (output / "results.json").exists()
    second = start(output)
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 0, said[-3000:]
    return output, said


@pytest.mark.slow
@pytest.mark.longest
def test_the_protocol_end_to_end(finished):
    output, said = finished
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["setting"]["seeds"] == 2 and list(results["arms"]) == sorted(
        TINY["arms"], key=[arm.name for arm in FULL.arms].index
    )
    layout = Layout(output)
    for name, arm in results["arms"].items():
        for seed in range(2):
            run = layout.run(seed, name)
            for decoding in ("greedy", "sampled"):
                found = qualities(run / f"{decoding}.jsonl")
                assert len(found) == TINY["held_out_pairs"]
                assert arm[decoding][seed] == pytest.approx(found.mean(), rel=1e-4)
            evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
            assert arm["accuracy"][seed] == pytest.approx(evaluation["eval/rewards/accuracies"], rel=1e-4)
            assert arm["augmented_margin"][seed] == pytest.approx(evaluation["eval/augmented/margin"], rel=1e-3)
            # Exactly 0 as users compile; with the flags of the tests the two programs differ in float order.
            assert abs(metrics_of(run)[0]["margin"]) < 1e-5, "starts at its reference"
    assert results["arms"]["dpo-more"]["curves"]["step"] == [2, 4] and results["arms"]["dpo"]["curves"]["step"] == [
        1,
        2,
    ]
    outcomes = {found["arm"]: found for found in results["outcomes"]}
    for shares in (outcomes["sr_dpo-0.5"][decoding] for decoding in ("greedy", "sampled")):
        assert np.add(np.add(shares["win"], shares["tie"]), shares["lose"]) == pytest.approx(1, abs=1e-4)
    assert outcomes["sr_dpo-0.5-more"]["against"] == "dpo-more"
    assert "True quality of responses" in said and (output / "report.html").exists()


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_does_nothing_twice(finished):
    output, _ = finished
    base, dpo = metrics_of(output / "base-run"), metrics_of(output / "seed-0" / "dpo")
    assert [line["step"] for line in base] == list(range(1, TINY["base_steps"] + 1))
    assert [line["step"] for line in dpo if "loss" in line] == [1, 2]
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix in (".jsonl", ".safetensors")]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = start(output)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-3000:]
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.slow
def test_one_reference_is_scored_once_for_all_arms(finished):
    """Counts one file for each data set and model; held-out pairs have one under the SFT model of each seed."""
    output, _ = finished
    plain = list((output / "cache").glob("reference-plain-*"))
    pairs_and_shuffled = 2 * 2  # other labels, other pairs: sides are swapped
    assert len(plain) == pairs_and_shuffled + 2 + 2


@pytest.mark.slow
def test_shuffled_pairs_are_the_same_pairs(finished):
    output, _ = finished
    rows, shuffled = (read_lines(output / "data" / f"{name}-0.jsonl") for name in ("pairs", "shuffled"))
    sides = [{row["chosen"], row["rejected"]} for row in rows]
    assert sides == [{row["chosen"], row["rejected"]} for row in shuffled]
    swapped = sum(row["chosen"] != other["chosen"] for row, other in zip(rows, shuffled, strict=True))
    assert 16 < swapped < 48


@pytest.mark.slow
def test_another_setting_is_refused_in_the_same_directory(finished):
    from sr_dpo_jax.commands.demo.demo import demo
    from sr_dpo_jax.errors import UsageError

    output, _ = finished
    with pytest.raises(UsageError, match=r"world\.json: was begun with another setting"):
        demo(output, full=True, seeds=2, knobs=Knobs(pairs=64))


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(finished, tmp_path):
    output, _ = finished
    seen = browser.look_at(output / "results.html", tmp_path)
    assert seen.requests == [] and seen.console == []
    assert set(seen.images) == {picture.title for picture in FIGURES}
    assert seen.width <= 1220


def test_the_protocol_is_the_papers():
    """Checks objectives, λ, at least five seeds, equal budgets, and the arms on more pairs and on shuffled labels."""
    for objective in ("sr_dpo", "sr_ipo"):
        assert [arm.lam for arm in FULL.arms if arm.objective == objective and arm.data == "pairs"] == list(LAMBDAS)
    assert FULL.seeds >= 5 and {arm.data for arm in FULL.arms} == {"pairs", MORE, SHUFFLED}
    assert {arm.objective for arm in SMALL.arms} == {"dpo", "ipo", "sr_dpo", "sr_ipo"} and SMALL.seeds == 1
    assert SMALL.label_noise == NOISE.label_noise == 0.3 and FULL.label_noise == 0
    layout, knobs = Layout(Path("x")), Knobs()
    configs = [arm_config(layout, FULL, knobs, 3, arm).model_dump() for arm in FULL.arms if arm.data == "pairs"]
    for config in configs:
        objective = {
            key: value for key, value in config.pop("objective").items() if key in ("name", "beta", "lam") or value
        }
        assert objective.keys() - {"divergence"} <= {"name", "beta", "lam"}, "nothing else is set"
        config.pop("output_dir")
    assert all(config == configs[0] for config in configs), "arms differ in the objective and nothing else"
    betas = {arm.name: arm_config(layout, FULL, knobs, 3, arm).objective.beta for arm in FULL.arms}
    controls = {name: betas.pop(name) for name in list(betas) if "-beta-" in name}
    assert set(betas.values()) == {0.5} and controls == {
        "dpo-beta-0.3": 0.15,
        "ipo-beta-0.7": 0.35,
        "ipo-beta-0.6": 0.3,
    }
    assert measured.baseline_of(FULL, next(arm for arm in FULL.arms if arm.name == "ipo-beta-0.7")) == "ipo"
    assert base_config(layout, FULL).model.init == "random"


def made_up(seeds: int) -> measured.Results:
    """Makes results of the form that `collect` gives, with random numbers."""
    rng = np.random.default_rng(0)

    def drawn(low: float, high: float) -> list[float]:
        return rng.uniform(low, high, seeds).round(4).tolist()

    def against() -> dict:
        return {name: drawn(0, 1) for name in ("accuracy", "accuracy_of_clear", "spearman", "mean")}

    names = ["accuracy", "augmented_accuracy", "augmented_accuracy_of_clear", "margins_agree", "margin", "given_plain"]
    names += ["augmented_margin", "step_time_s"]
    names += [f"{p}{name}" for p in ("", "augmented_") for name in ("pearson", "spearman", "kendall")]
    arms = {}
    for arm in FULL.arms:
        curves = {"step": [1, 2]} | {
            name: [0.1, 0.2]
            for name in ("margin", "augmented/margin", "rewards/accuracies", "augmented/accuracies", "loss")
        }
        arms[arm.name] = {"objective": arm.objective, "lam": arm.lam, "data": arm.data, "curves": curves}
        arms[arm.name]["beta"] = None if arm.beta_share is None else arm.beta(0.5)
        arms[arm.name] |= {name: drawn(0, 1) for name in names}
        arms[arm.name] |= {name: drawn(20, 90) for name in ("sampled", "greedy")}
        arms[arm.name] |= {"shift_share": drawn(0, 1)} if arm.lam is not None else {}
    stage = {"sampled": drawn(10, 40), "greedy": drawn(10, 40), "plain": against(), "augmented": against()}
    shares = {"win": [0.5] * seeds, "tie": [0.3] * seeds, "lose": [0.2] * seeds}
    outcomes = [
        {"arm": arm, "against": against, "sampled": shares, "greedy": shares}
        for arm, against in measured.comparisons(FULL)
    ]
    setting = {
        "seeds": seeds,
        "tasks": ["copy"],
        "pairs": 64,
        "held_out_pairs": 32,
        "base_texts": 100,
        "more_factor": 4,
    }
    setting |= {"rated_share": 0.5, "rating_noise": 0.4, "label_noise": 0.0, "gaps": [1, 1, 1], "beta": 0.5}
    known = {"ratings": [1, 100], "mean_quality": [1.0, 90.0], "spearman": 1.0, "spearman_by_task": 0.9}
    return {
        "setting": setting,
        "knowledge": {**known, "spearman_of_responses": None},
        "counting_words": {"accuracy": 0.9, "accuracy_of_clear": 0.9, "spearman": 0.8},
        "stages": {"base": stage, "sft": {**stage, "plain_margin": against(), "augmented_margin": against()}},
        "arms": arms,
        "outcomes": outcomes,
    }


@pytest.mark.parametrize("seeds", [1, 5])
def test_tables_and_page_of_any_number_of_seeds(seeds):
    results = made_up(seeds)
    page, text = render(results), measured.markdown(results)
    assert "<script" not in page and page.count("<figure") == len(FIGURES)
    for title, table in measured.tables(results).items():
        assert f"### {title}\n" in text and title in page
        assert all(len(row) == len(table.head) for row in table.rows)
    assert "nan" not in text.lower().replace("finance", "")
    by_name = {row[0]: row for row in measured.quality_table(results).rows}
    values = results["arms"]["sr_dpo-0.3"]["sampled"]
    assert by_name["Sr-DPO, λ = 0.3"][1].split()[0] == f"{np.mean(values):.1f}"
    assert ("[" in by_name["DPO"][1]) == (seeds > 1)
    wins = {tuple(row[:2]): row[2:] for row in measured.outcome_table(results).rows}
    compared = set(wins)
    assert ("Sr-DPO, λ = 0.5, shuffled labels", "DPO, shuffled labels") in compared
    assert wins["Sr-IPO, λ = 1", "IPO"][:3] == ["50.0", "30.0", "20.0"]
    assert {("DPO, β = 0.15", "DPO"), ("Sr-DPO, λ = 1", "DPO, β = 0.15"), ("Sr-IPO, λ = 1", "IPO, β = 0.35")} < compared
    assert len(compared) == 8 + 3 + 2 + 3, "refined, controls, other pairs, refined against controls"
    assert not {"DPO, β = 0.15", "DPO"} & {row[0] for row in measured.cost_table(results).rows}


def test_the_findings_page_holds_the_tables_of_the_committed_results():
    """Makes the page's tables from results.json, which `sr-dpo demo --full` writes, and compares them with the page."""
    page = (WORLD / "README.md").read_text(encoding="utf-8")
    embedded = page.partition("<!-- results -->\n")[2].partition("<!-- end of results -->")[0]
    committed = WORLD / "results.json"
    if not committed.exists():
        assert embedded == "Not measured yet.\n"
        return
    results = json.loads(committed.read_text(encoding="utf-8"))
    assert embedded == measured.markdown(results)
    claims = page.partition("## What it says of the claims\n")[2].partition("\n## ")[0]
    said, measured_numbers = (set(re.findall(r"\d+\.\d+", text)) for text in (claims, embedded))
    assert len(said) > 20 and said - measured_numbers == set(), "figures in the text that are in no table"
    assert results["setting"]["seeds"] >= 5 and results["knowledge"]["spearman"] >= 0.8
    assert min(results["arms"]["dpo"]["augmented_accuracy_of_clear"]) > 0.5
    gain = np.subtract(results["arms"]["dpo-shuffled"]["sampled"], results["stages"]["sft"]["sampled"])
    assert gain.mean() < 1, "shuffled labels teach nothing"


def test_the_findings_on_wrong_labels_hold_the_tables_of_their_results():
    """Makes them from noise.json, the results.json of `sr-dpo demo --noise`, and compares them with the page."""
    page = (WORLD / "README.md").read_text(encoding="utf-8")
    embedded = page.partition("<!-- noise -->\n")[2].partition("<!-- end of noise -->")[0]
    results = json.loads((WORLD / "noise.json").read_text(encoding="utf-8"))
    assert embedded == measured.markdown(results, measured.NOISE_TABLES)
    said = page.partition("## Labels of which some are wrong\n")[2].partition("<!-- noise -->")[0]
    numbers = set(re.findall(r"\d+\.\d+", said.partition("Before this")[0]))
    assert numbers - set(re.findall(r"\d+\.\d+", embedded)) == set(), "figures in the text that are in no table"
    assert results["setting"]["label_noise"] == 0.3
