"""Two processes that differ: what one has for itself is refused on both before the first step, with exit code 2."""

import json

import pytest
from runs import model_directory, preference_file, raw_config, run_processes, written

from sr_dpo_jax.cli import main
from sr_dpo_jax.generation import generator

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

START_S = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 16, seed=1)


def swapped(path, root):
    """A copy of a file of pairs whose chosen and rejected responses have changed places."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = root / "swapped.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return other


def differing(world, root, kind):
    """The arguments that process 1 alone has, and the key that both name."""
    _, train = world
    return {
        "beta": (["objective.beta=5.0"], "objective.beta"),
        "pairs": ([f"data.path={swapped(train, root)}"], "data.path"),
        "held-out pairs": ([f"data.eval_path={swapped(train, root)}"], "held-out set eval"),
        "weights": ([f"model.path={model_directory(root / 'other', layer_norm_eps=1e-4)}"], "model.path"),
        "directory": ([f"output_dir={root / 'elsewhere'}"], "output_dir"),
        "instruction": (["refinement.prompt='Rate it. '"], "refinement.prompt"),
    }[kind]


@pytest.mark.parametrize("kinds", [("beta", "pairs", "weights", "directory"), ("held-out pairs", "instruction")])
def test_p1_processes_that_differ_are_refused_by_name(world, tmp_path, kinds):
    """Each key is compared by itself, so one start shows several; what another of them could change is in the other."""
    found = [differing(world, tmp_path, kind) for kind in kinds]
    arguments = [argument for own, _ in found for argument in own]
    raw = raw_config(tmp_path, *world)
    raw["data"]["eval_path"] = str(world[1])
    started = run_processes(["train", written(tmp_path, raw)], own=((), arguments))
    for number, process in enumerate(started):
        said, _ = process.communicate(timeout=START_S)
        assert process.returncode == 2, said
        assert f"the processes of this run differ; this is process {number}" in said
        assert all(f"  {key}: not on process 1 as on process 0" in said for _, key in found), said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("*/checkpoints/*")) and not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("command", "alone"), [("eval", ["--best"]), ("score", ["--knowledge"]), ("generate", ["--best"])]
)
def test_p1_an_option_that_one_process_alone_has_is_refused(world, tmp_path, command, alone):
    """Options decide which collectives come, so that processes would wait for ever, or take each other's numbers."""
    raw = raw_config(tmp_path, *world)
    raw["data"]["eval_path"], prompts = str(world[1]), tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "sort the cat"}) + "\n", encoding="utf-8")
    both = ["--prompts", str(prompts)] if command == "generate" else []
    both += [] if command == "eval" else ["--output", str(tmp_path / "out.jsonl")]
    for process in run_processes([command, written(tmp_path, raw)], own=(both, [*both, *alone])):
        said, _ = process.communicate(timeout=START_S)
        assert process.returncode == 2 and f"  {alone[0]}: not on process 1 as on process 0" in said, said


def test_p1_generation_goes_on_where_only_process_0_has_the_unfinished_file(world, tmp_path, monkeypatch):
    """Outputs on local disks: process 1 has another directory, and is told what is done."""
    raw = raw_config(tmp_path, *world, generation={"max_new_tokens": 6, "slots": 8})
    path, prompts = written(tmp_path, raw), tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"sort the cat {n}"}) + "\n" for n in range(6)), encoding="utf-8")
    outputs = [tmp_path / name / "out.jsonl" for name in ("golden", "first", "second")]
    for output in outputs:
        output.parent.mkdir()
    command = ["generate", path, "--prompts", str(prompts)]
    assert main([*command, "--output", str(outputs[0])]) == 0

    def killed(self, params, wanted):
        for number, result in enumerate(respond(self, params, wanted)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    respond = generator.Generator.respond
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generator.Generator, "respond", killed)
        main([*command, "--output", str(outputs[1])])
    own = [["--output", str(output)] for output in outputs[1:]]
    # The command takes its overrides behind the configuration, before the options.
    for process in run_processes(command[:2], own=[[*command[2:], *outputs_of] for outputs_of in own]):
        said, _ = process.communicate(timeout=START_S)
        assert process.returncode == 0, said
    found = [[json.loads(line)["response"] for line in output.read_text().splitlines()] for output in outputs[:2]]
    assert found[0] == found[1] and not outputs[2].exists()
