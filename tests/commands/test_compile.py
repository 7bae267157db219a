"""`sr-dpo compile` with the TPU compiler itself: needs libtpu (the `tpu` extra), no TPU. Marked `aot`.

So that the suite takes minutes, the compiler makes its least effort (--quick): the memory that it then finds is close
to that of a run. One process runs the commands one after the other, and of configurations that differ by the loss alone
one is compiled: `test_configs.py` shows that their programs are the same.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import known_models
import pytest
from published_configs import NAMES, commands, known_model, load, options
from transformers import AutoConfig

from sr_dpo_jax.commands.compile.machine import only_one
from sr_dpo_jax.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = """
import contextlib, io, json, logging, sys, traceback
from sr_dpo_jax import cli
answers = sys.stdout
for line in sys.stdin:
    logging.getLogger().handlers.clear()
    with io.StringIO() as said:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = cli.main(json.loads(line))
            except Exception:
                traceback.print_exc()
                code = 1
        print(json.dumps([code, said.getvalue()]), file=answers, flush=True)
"""
COSTS = """
import json, sys
from sr_dpo_jax.commands.compile import hlo, programs, typical
from sr_dpo_jax.commands.compile.machine import devices_of
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.parallel.mesh import make_mesh
from sr_dpo_jax.train.setup import set_up_on
from sr_dpo_jax.weights.directory import open_directory

path, topology, *objectives = sys.argv[1:]
devices = devices_of(topology, 1)
for overrides in map(json.loads, objectives):
    config = load_config(path, overrides)
    mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
    setup = set_up_on(mesh, config, open_directory(config.model.path, weights=False))
    lengths = {"max_length": config.data.max_length, "max_prompt_length": config.data.max_prompt_length}
    pairs = typical.typical_pairs("hh_rlhf", least_pairs=640, head_tokens=0, augmentation_tokens=50, **lengths)
    plan = setup.plan(pairs, ())
    step = programs.first_step(setup, pairs, plan, augmented=setup.objective.judged_in_step)
    program, arguments = programs.train_step_of(setup, plan, step)
    compiled = program.lower(*arguments).compile()
    flops, cycles = compiled.cost_analysis()["flops"], hlo.read(compiled.as_text()).cycles
    print("costs", json.dumps([flops, cycles]), flush=True)
"""
LONG_ROWS = ["data.max_length=20000", "data.max_prompt_length=10000", "batch.row_length=65536"]
LONG_ROWS += ["batch.pairs_per_step=700"]  # 35,000 tokens for each of four shards
ON_SLICES = ("llama3_70b_sr_dpo",)
"""The configurations that are compiled for the last topology of their head comments, which is of two slices; the others
are for the first, and a small model for each kind of chip."""
COMMANDS = [(name, len(commands(name, "compile")) - 1 if name in ON_SLICES else 0) for name in NAMES]

pytestmark = pytest.mark.aot


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    output: str
    report: dict[str, Any]


def start(program: list[str], *, quiet: bool = False, **environment: str) -> "subprocess.Popen[str]":
    """Python with a user's environment: libtpu serves one process at a time, so never in this one."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    env.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, *program],
        env=env,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def run():
    """`(arguments, json_path) -> Result` of `sr-dpo ARGUMENTS`; without a path at the compiler's full effort."""
    workers = [start(["-c", WORKER], quiet=True)]

    def in_worker(arguments: list[str], json_path: Path | None = None) -> Result:
        if workers[-1].poll() is not None:
            workers.append(start(["-c", WORKER], quiet=True))
        whole = arguments if json_path is None else [*arguments, "--quick", "--json", str(json_path)]
        print(json.dumps(whole), file=workers[-1].stdin, flush=True)
        answer = workers[-1].stdout.readline()
        assert answer, f"the process has ended with {workers[-1].wait()}"
        report = json.loads(json_path.read_text(encoding="utf-8")) if json_path and json_path.is_file() else {}
        return Result(*json.loads(answer), report)

    yield in_worker
    workers[-1].stdin.close()
    workers[-1].wait(timeout=60)


@pytest.fixture(scope="session")
def model_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in known_models.MODELS:
        known_models.model_directory(root, name)
    return root


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, model_root, run):
    """`(configuration, number of its command) -> Result`, each distinct program compiled once."""
    root, kept = tmp_path_factory.mktemp("compiled"), {}

    def compile_once(name: str, number: int) -> Result:
        if name.endswith("ipo"):  # the program is DPO's, but for a few operations on one number a pair
            name = f"{name.removesuffix('ipo')}dpo"
        if (name, number) not in kept:
            arguments = commands(name, "compile")[number]
            arguments[2:2] = [f"model.path={model_root / known_model(name)}"]
            kept[name, number] = run(arguments, root / f"{name}_{number}.json")
        return kept[name, number]

    return compile_once


@pytest.mark.parametrize(("name", "number"), COMMANDS)
def test_every_configuration_fits_its_topology(compiled, name, number):
    result = compiled(name, number)
    assert result.code == 0, result.output
    report = result.report["compiled"]
    given = options(commands(name, "compile")[number])
    config = load(name, tuple(given.overrides))
    parameters, adapters = known_models.MODELS[known_model(name)][2], report["adapters"]
    assert report["parameters"] == parameters + adapters and bool(adapters) == (config.lora is not None)
    assert report["hosts"] == config.distributed.processes
    assert report["chips"] == (8 if given.topology in ("v5e:2x4", "v6e:2x4") else 4) * report["hosts"]
    assert report["step_s"] is None  # the cycles of --quick say nothing
    assert result.report["fits"] and result.report["remedy"] is None
    train, score = report["programs"]
    # Parameters and RMSprop's state in float32, or a base in bfloat16 beside adapters with AdamW's two moments; shards
    # that are no multiple of 128 are filled up.
    state = 2 * parameters + (4 + 8) * adapters if adapters else (4 + 4) * parameters
    state *= report["mesh"]["replica"] / report["chips"]
    assert state <= train["argument_bytes"] < 1.25 * state
    assert state / 2 <= score["argument_bytes"] < train["argument_bytes"]
    for program in (train, score):
        assert program["peak_bytes"] <= 0.95 * program["hbm_bytes"]
        assert program["unknown_loops"] == program["unknown_kernels"] == 0
        assert "all-to-all" not in program["collectives"]


@pytest.mark.parametrize("name", ["pythia_2.8b_hh", "zephyr_7b_ultrafeedback"])
def test_the_refinement_costs_one_forward(compiled, name):
    """The program as traced, before the compiler: DPO takes three forwards and the logits once more."""
    dpo, sr_dpo = (compiled(f"{name}_{objective}", 0).report["compiled"] for objective in ("dpo", "sr_dpo"))
    extra = sr_dpo["programs"][0]["traced_flops"] / dpo["programs"][0]["traced_flops"]
    assert 1.25 < extra < 1.45
    assert sr_dpo["model_flops_a_pair"] / dpo["model_flops_a_pair"] == pytest.approx(4 / 3, rel=0.03)


@pytest.mark.parametrize("name", ["pythia_2.8b_hh", "zephyr_7b_ultrafeedback"])
def test_the_refinement_gathers_no_weights_of_its_own(compiled, name):
    """The bytes that devices hand each other to have whole weights, in all-gathers and in the rings of permutes that
    the compiler makes of them beside matmuls, pass DPO's by less than one vocabulary matrix, or are fewer."""

    def gathered(objective: str) -> int:
        collectives = compiled(f"{name}_{objective}", 0).report["compiled"]["programs"][0]["collectives"]
        return sum(collectives.get(kind, (0, 0))[1] for kind in ("all-gather", "collective-permute"))

    _, fields, parameters = known_models.MODELS[known_model(name)]
    bfloat16 = 2
    assert gathered("dpo") > bfloat16 * parameters
    assert gathered("sr_dpo") - gathered("dpo") < bfloat16 * fields["vocab_size"] * fields["hidden_size"]


def tiny_config(tmp_path: Path, family: str, **fields: Any) -> list[str]:
    """A configuration of a small model, as arguments."""
    common = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
    }
    tmp_path.mkdir(exist_ok=True)
    AutoConfig.for_model(family, **(common | fields)).save_pretrained(tmp_path / "model")
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "attention": "splash"},
        "data": {"path": "unread"},
        "objective": {"name": "sr_dpo", "lam": 0.5},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return ["compile", str(path)]


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_attention_with_windows_and_caps_compiles(tmp_path, run, topology):
    """Every second layer has a window. Without either the configurations compile it, for the pods that they name."""
    fields = {"sliding_window": 300, "query_pre_attn_scalar": 64}
    result = run([*tiny_config(tmp_path, "gemma2", **fields), "--topology", topology], tmp_path / "report.json")
    assert result.code == 0, result.output
    report = result.report["compiled"]
    assert (report["chips"], report["attention"]) == (4, "splash")
    for program in report["programs"]:
        assert program["kernel_cycles"] > 0 and program["unknown_kernels"] == 0
    assert set(report["blocks_visited"]) == {"plain", "augmented"}
    assert all(0 < share < 1 for share in report["blocks_visited"].values())


def test_the_contrast_by_the_reference_costs_what_dpo_costs(tmp_path):
    """XLA's own flops of one chip's step and its estimated cycles, at the compiler's full effort.

    The worker of the other tests holds libtpu's own lock for as long as it lives.
    """
    _, path = tiny_config(tmp_path, "llama")
    objectives = {
        "dpo": ["objective.name=dpo", "objective.lam=null"],
        "contrast": ["refinement.form=contrast", "refinement.judge=reference", "objective.lam=auto"],
        "contrast by the policy": ["refinement.form=contrast"],
    }
    process = start(
        ["-c", COSTS, path, "v5e:2x2", *map(json.dumps, objectives.values())], ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    lines = [json.loads(line.removeprefix("costs ")) for line in said.splitlines() if line.startswith("costs ")]
    costs = dict(zip(objectives, lines, strict=True))
    (flops, cycles), (dpo_flops, dpo_cycles) = costs["contrast"], costs["dpo"]
    print({name: (line[0] / dpo_flops, line[1] / dpo_cycles) for name, line in costs.items()})
    assert flops == pytest.approx(dpo_flops, rel=5e-3)
    assert cycles == pytest.approx(dpo_cycles, rel=2e-2)
    by_policy = costs["contrast by the policy"]
    assert by_policy[0] > 1.1 * dpo_flops and by_policy[1] > 1.03 * dpo_cycles


def test_a_reference_of_another_architecture_has_a_scoring_step_of_its_own(tmp_path, run):
    """It is compiled too, as it is what may not fit; it cannot stay on the mesh, and must be of use."""
    _, path = tiny_config(tmp_path / "reference", "llama", num_hidden_layers=8)  # four times the policy's, in bfloat16
    arguments = [*tiny_config(tmp_path, "llama"), f"reference.path={Path(path).parent / 'model'}"]
    topology = ["--topology", "v5e:2x2"]
    result = run([*arguments, *topology], tmp_path / "report.json")
    assert result.code == 0, result.output
    programs = result.report["compiled"]["programs"]
    assert [program["name"] for program in programs] == ["train step", "scoring step", "reference's scoring step"]
    assert programs[2]["argument_bytes"] > 1.2 * programs[1]["argument_bytes"]
    for override, said in {
        "reference.mode=online": "has another architecture",
        "objective.name=cpo": "objective.name=cpo needs no reference",
    }.items():
        refused = run([*arguments, override, "objective.lam=null", "objective.name=dpo", override, *topology])
        assert refused.code == 2 and said in refused.output, refused.output


def test_what_does_not_fit_comes_with_a_change_that_does(tmp_path, model_root, run):
    arguments = tiny_config(tmp_path, "llama")
    arguments += [f"model.path={model_root / 'llama-3.2-1b'}", "batch.pairs_per_step=128"]
    result = run([*arguments, "--topology", "v5e:2x2"], tmp_path / "report.json")
    assert result.code == 2, result.output
    assert not result.report["fits"]
    train = result.report["compiled"]["programs"][0]
    assert train["peak_bytes"] > 0.95 * train["hbm_bytes"]
    fitting = [attempt["overrides"] for attempt in result.report["attempts"] if attempt["fits"]]
    assert fitting[-1] == result.report["remedy"]
    remedy = [f"{key}={value}" for key, value in result.report["remedy"].items()]
    assert f"This does: {' '.join(remedy)}" in " ".join(result.output.split())
    load_config(Path(arguments[1]), [*arguments[2:], *remedy])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5e:3x5"], "--topology v5e:3x5"),
        (["--topology", "v9:2x2"], "--topology v9:2x2"),
        (["mesh.fsdp=3", "--topology", "v5e:2x2"], "does not make up 4 devices"),
        (["mesh.tensor=4", "mesh.fsdp=1", "--topology", "v5e:2x2"], "kv_heads"),
        (["--topology", "v5e:2x2", "--slices", "2"], "mesh.replica to a multiple of 2"),
        (["batch.row_length=512", "--topology", "v5e:2x2"], "batch.row_length"),
        ([*LONG_ROWS, "--topology", "v5e:2x2"], "batch.row_length=65536"),
    ],
)
def test_faults_are_said_without_a_traceback(tmp_path, run, arguments, said):
    result = run([*tiny_config(tmp_path, "llama"), *arguments])
    assert result.code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_second_command_waits_for_the_first(tmp_path):
    """The first is this process, which holds the lock; the second says that it waits, and goes on once it is free."""
    # The worker of the other tests holds libtpu's own lock for as long as it lives.
    environment = {"TMPDIR": str(tmp_path), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    lines: list[str] = []
    waits = threading.Event()

    def listen(process: "subprocess.Popen[str]") -> None:
        for line in process.stdout:
            lines.append(line)
            if "waiting for it" in line:
                waits.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        with only_one():
            command = ["-m", "sr_dpo_jax.cli", *tiny_config(tmp_path, "llama"), "--topology", "v5e:3x5"]
            process = start(command, **environment)
            listener = threading.Thread(target=listen, args=(process,))
            listener.start()
            assert waits.wait(timeout=120), lines
            assert process.poll() is None
    listener.join(timeout=600)
    assert process.wait() == 2
    assert "--topology v5e:3x5" in "".join(lines)
