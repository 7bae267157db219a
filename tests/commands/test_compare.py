"""Comparing objectives: what is run, what chooses β, what is compared, and that a stopped comparison goes on."""

import json
import sys

import pytest
import scipy.stats
import yaml
from runs import model_directory, preference_file, raw_config

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands import compare as compared
from sr_dpo_jax.commands.compare import parse_entry
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.errors import UsageError

CONTRAST = "sr_dpo,lam=1,refinement.form=contrast,refinement.judge=reference"


@pytest.fixture
def config(tmp_path):
    """A configuration whose own refinement is a contrast, which plain objectives do not take."""
    sections = {
        "data": {"eval_path": str(preference_file(tmp_path / "held_out.jsonl", 8, seed=2))},
        "refinement": {"form": "contrast"},
        "train": {"max_steps": 1},
    }
    raw = raw_config(
        tmp_path, model_directory(tmp_path / "model"), preference_file(tmp_path / "train.jsonl", 16), **sections
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(tmp_path / "run.yaml")


@pytest.fixture
def commands(monkeypatch):
    """Takes the place of the processes: writes held-out margins that β decides, and lists what was run."""
    ran, codes = [], {}

    def run(_child, arguments):
        command, file = arguments[:2]
        config = load_config(file)
        root = compared.Path(config.output_dir)
        ran.append((command, root.parent.name, root.name))
        if codes.get(root.name):
            return codes.pop(root.name)
        if command == "eval":
            root.mkdir(parents=True, exist_ok=True)
            # The deciding pairs (0, 2, ...) are all right at β = 0.3 alone; the others depend on the objective.
            right = {0.3: 4}.get(round(config.objective.beta, 6), 2)
            others = 3 + config.seed if config.objective.name == "sr_dpo" else 1
            margins = [1.0 if (index // 2 < (others if index % 2 else right)) else -1.0 for index in range(8)]
            lines = [{"id": str(index), "margin": margin} for index, margin in enumerate(margins)]
            lines = [line | {"rating_difference": float(line["id"])} for line in lines]
            (root / "eval_pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (root / "eval.json").write_text(json.dumps({"step": 1, "eval/margin": 0.5 + config.seed}))
            (root / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.7}) + "\n")
        if command == "generate":
            prompts, output = (
                compared.Path(arguments[arguments.index(name) + 1]) for name in ("--prompts", "--output")
            )
            # The contrast answers with more words, the second seed with one more.
            words = config.seed + (3 if config.refinement.form == "contrast" else 1)
            lines = [json.dumps({**json.loads(line), "response": "word " * words}) for line in prompts.open()]
            output.write_text("\n".join(lines) + "\n")
        return 0

    monkeypatch.setattr("sr_dpo_jax.commands.tune.Child.run", run)
    return ran, codes


def test_every_beta_on_the_first_seed_and_the_best_on_the_others(config, commands, tmp_path, capsys):
    ran, _ = commands
    assert main(["compare", config, "dpo", CONTRAST, "--betas", "1,3,10", "--seeds", "2"]) == 0
    trained = [(label, name) for command, label, name in ran if command == "train"]
    first = [(label, f"beta-{beta}-seed-0") for label in ("dpo", CONTRAST) for beta in ("0.1", "0.3", "1")]
    assert trained == [*first, ("dpo", "beta-0.3-seed-1"), (CONTRAST, "beta-0.3-seed-1")]
    table = (tmp_path / "run" / "compare" / "compare.md").read_text()
    main_table, _, _ = table.partition("The sweep")
    (row,) = (line for line in main_table.splitlines() if line.startswith(f"| {CONTRAST} | 0.3 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Of pairs 1, 3, 5, 7 DPO has one right, the contrast three with seed 0 and all with seed 1.
    assert cells[3].startswith("0.875") and cells[6].startswith("0.625")
    assert float(cells[7]) == pytest.approx(scipy.stats.ttest_rel([0.75, 1.0], [0.25, 0.25]).pvalue, abs=1e-3)
    assert cells[4].startswith("0.75"), "the mean margin of the compared pairs: 0.5 and 1"
    assert "report.html" in capsys.readouterr().out
    config_of = yaml.safe_load((tmp_path / "run" / "compare" / "dpo" / "beta-0.1-seed-0.yaml").read_text())
    assert config_of["refinement"]["form"] == "margin", "a plain objective has no refinement of another one"


def test_a_comparison_that_was_stopped_goes_on(config, commands):
    ran, codes = commands
    codes["beta-0.3-seed-0"] = 75
    assert main(["compare", config, "dpo", "ipo", "--betas", "1,3"]) == 75
    assert main(["compare", config, "dpo", "ipo", "--betas", "1,3"]) == 0
    trained = [(label, name) for command, label, name in ran if command == "train"]
    assert trained.count(("dpo", "beta-0.1-seed-0")) == 1 and trained.count(("dpo", "beta-0.3-seed-0")) == 2
    before = len(ran)
    assert main(["compare", config, "dpo", "ipo", "--betas", "1,3"]) == 0
    assert len(ran) == before, "all finished"


def test_other_data_is_another_comparison(config, commands, tmp_path):
    ran, _ = commands
    assert main(["compare", config, "dpo", "ipo", "--betas", "1"]) == 0
    preference_file(tmp_path / "held_out.jsonl", 8, seed=3)
    before = len(ran)
    assert main(["compare", config, "dpo", "ipo", "--betas", "1"]) == 0
    assert len(ran) == 2 * before


def test_overrides_hold_for_all_runs(config, commands, tmp_path):
    assert main(["compare", config, "dpo", "ipo", "train.max_steps=2", "--betas", "1"]) == 0
    for label in ("dpo", "ipo"):
        raw = yaml.safe_load((tmp_path / "run" / "compare" / label / "beta-0.1-seed-0.yaml").read_text())
        assert raw["train"]["max_steps"] == 2 and raw["cache_dir"] == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dpo"], "name two objectives or more"),
        (["dpo", "dpo"], "dpo: named twice"),
        (["dpo", "sr_dpo,lam"], "'lam' is not of the form key=value"),
        (["dpo", "ipo", "--seeds", "0"], "--seeds 0"),
        (["dpo", "ipo", "--betas", "0,1"], "--betas 0.0,1.0"),
        (["dpo", "sr_dpo"], "objective.lam: missing"),
        (["dpo", "dopo"], "objective.name='dopo': not known"),
        (["dpo", "ipo,data.path=x.jsonl"], "data.path is the same for all runs"),
        (["dpo", "ipo", "objective.beta=0.7"], "objective.beta=0.7: each objective says it for itself"),
        (["dpo", "sft"], "sft has no margins to compare"),
        (["dpo", "sr_dpo,lam=1,refinement.against=Bad: "], "reads as a mapping; put it in quotes"),
    ],
)
def test_what_cannot_be_compared_is_refused(config, commands, capsys, arguments, said):
    assert main(["compare", config, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert commands[0] == []


def test_held_out_pairs_are_asked_for(config, capsys):
    assert main(["compare", config, "dpo", "ipo", "data.eval_path=null"]) == 2
    assert "data.eval_path is not set" in capsys.readouterr().err


def test_an_entry_is_read_as_yaml():
    entry = parse_entry("sr_dpo,lam=auto,beta=0.5,refinement.form=contrast")
    assert entry.sections == {
        "objective": {"name": "sr_dpo", "lam": "auto", "beta": 0.5},
        "refinement": {"form": "contrast"},
    }
    quoted = parse_entry("sr_dpo,refinement.against='Rate it low, please: ',lam=1")
    assert quoted.sections["refinement"] == {"against": "Rate it low, please: "}
    assert quoted.sections["objective"]["lam"] == 1
    with pytest.raises(UsageError, match="begin with the objective's name"):
        parse_entry("lam=1,sr_dpo")
    with pytest.raises(UsageError, match="mixed has no β of its own"):
        parse_entry("mixed")


def test_beta_is_the_entrys_the_files_or_the_losss(config):
    base, root = load_config(config, ["objective.beta=0.7"]), compared.Path("x")
    betas = {text: compared._run(base, root, parse_entry(text), 0).beta for text in ("dpo", "dpo,beta=0.2", "ipo")}
    assert betas == {"dpo": 0.7, "dpo,beta=0.2": 0.2, "ipo": 0.1}, "the file's objective is sr_dpo"


def test_every_process_keeps_its_own_place(config, commands, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("sr_dpo_jax.commands.tune.Child.run", lambda _child, arguments: given.append(arguments) or 3)
    own = ["distributed.processes=2", "distributed.process_id=1", "distributed.coordinator_address=host:1"]
    assert main(["compare", config, "dpo", "ipo", *own]) == 3
    assert {"distributed.processes=2", "distributed.process_id=1"} < set(given[0])
    assert "process_id: 1" not in compared.Path(given[0][1]).read_text()


def test_a_long_instruction_is_no_directory_name():
    label = f"sr_dpo,refinement.against='{'word ' * 60}'"
    assert len(compared._directory(label)) < 100 and compared._directory("dpo,beta=0.1") == "dpo,beta=0.1"


COUNT = """import json, sys
for number, line in enumerate(sys.stdin):
    print(len(json.loads(line)["response"].split()) + number)
"""


@pytest.fixture
def asked(tmp_path):
    """Options for three prompts and a scorer, a program that counts words and adds the prompt's number."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "count.py").write_text(COUNT)
    scorer = f"{sys.executable} {tmp_path / 'count.py'}"
    return ["--prompts", str(tmp_path / "prompts.jsonl"), "--scorer", scorer]


def test_responses_of_the_best_beta_are_scored(config, commands, asked, tmp_path):
    ran, _ = commands
    arguments = ["compare", config, "dpo", CONTRAST, "--betas", "1,3", "--seeds", "2", *asked]
    assert main(arguments) == 0
    generated = [(label, name) for command, label, name in ran if command == "generate"]
    assert generated == [(label, f"beta-0.3-seed-{seed}") for label in ("dpo", CONTRAST) for seed in (0, 1)]
    table = (tmp_path / "run" / "compare" / "compare.md").read_text().partition("The sweep")[0]
    dpo, contrast = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith(("| dpo", f"| {CONTRAST}"))
    )
    # Words: 1 and 2, or 3 and 4; the numbers of the prompts add 1 in the mean.
    assert dpo[-3].startswith("2.5") and contrast[-3].startswith("4.5")
    assert contrast[-2].startswith("2.0") and float(contrast[-1]) == 0
    before = len(ran)
    assert main(arguments) == 0 and len(ran) == before, "all finished"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "another"}\n')
    assert main(arguments) == 0
    assert [command for command, *_ in ran[before:]] == ["generate"] * 4


@pytest.mark.parametrize(
    ("scorer", "code", "said"),
    [
        ("head -n 2 {counts}", 2, "one finite number on a line for each of 3 responses"),
        ("echo 1 nan 2", 2, "one finite number"),
        ("echo a b c", 2, "one finite number"),
        ("false", 1, "ended with exit code 1"),
        ("no-such-command", 2, "no such command"),
        ("cat 'a", 2, "No closing quotation"),
    ],
)
def test_a_scorer_that_gives_no_scores_is_one_error(config, commands, asked, tmp_path, capsys, scorer, code, said):
    (tmp_path / "counts").write_text("1\n2\n3\n")
    options = [*asked[:3], scorer.format(counts=tmp_path / "counts")]
    assert main(["compare", config, "dpo", "ipo", "--betas", "1", *options]) == code
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("scores.txt"))
    if scorer != "false":
        return
    assert main(["compare", config, "dpo", "ipo", "--betas", "1", "--scorer", "true"]) == 2
    assert "--prompts" in capsys.readouterr().err
    ran, _ = commands
    before = len(ran)
    assert main(["compare", config, "dpo", "ipo", "--betas", "1", *asked]) == 0
    assert [command for command, *_ in ran[before:]] == ["generate"], "the first responses stayed"
