"""SFT on ordinary SFT data: conversations, or prompts with completions; the numbers of the same pairs' chosen sides."""

import json

import pytest
from runs import make_config, metrics_of, model_directory, preference_file, without_times

from sr_dpo_jax.cli import main
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model and the same texts as pairs and as rows with one response, for training and held out."""
    root = tmp_path_factory.mktemp("sft")
    model_directory(root / "model")
    for name, seed in (("train", 1), ("held_out", 2)):
        preference_file(root / f"{name}.jsonl", 16, seed=seed)
        rows = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        ones = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        (root / f"{name}_sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ones))
    return root


def config_of(world, root, format, end, objective="sft"):
    data = {"format": format, "eval_path": str(world / f"held_out{end}.jsonl")}
    objective = {"name": objective, "lam": None}
    data_path = world / f"train{end}.jsonl"
    return make_config(root, world / "model", data_path, data=data, objective=objective, train={"max_steps": 2})


def test_its_numbers_are_those_of_the_chosen_sides(world, tmp_path):
    found = []
    for format, end in (("preference", ""), ("sft", "_sft")):
        config = config_of(world, tmp_path / format, format, end)
        assert train(config) == 0
        found.append(metrics_of(config.output_dir))
    pairs, ones = map(without_times, found)
    assert [line["loss"] for line in ones if "loss" in line] == pytest.approx(
        [line["loss"] for line in pairs if "loss" in line]
    )
    assert [line["eval/loss"] for line in ones if "eval/loss" in line] == pytest.approx(
        [line["eval/loss"] for line in pairs if "eval/loss" in line]
    )


def test_a_comparison_of_one_response_is_refused(world, tmp_path, capsys):
    with pytest.raises(
        UsageError, match=r"data\.format=sft: its rows have one response, and objective\.name=dpo compares"
    ):
        config_of(world, tmp_path, "sft", "_sft", objective="dpo")
    config = config_of(world, tmp_path, "sft", "_sft")
    raw = config.model_dump(mode="json")
    raw["objective"], raw["data"]["format"] = {"name": "dpo"}, "preference"
    raw["data"]["eval_sets"] = {"other": {"path": raw["data"]["eval_path"], "format": "sft"}}
    with pytest.raises(UsageError, match=r"data\.eval_sets\.other\.format=sft"):
        config_from_dict(raw, where="test")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["score", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "scores.jsonl")]) == 2
    assert "score compares two" in capsys.readouterr().err
