"""Weights & Biases: calls of a module in its place by runs that are cut off and resumed, and refusals."""

import json
import sys
import types

import pytest
from runs import make_config, metrics_of, model_directory, preference_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.wandb_run import require_wandb

pytestmark = pytest.mark.usefixtures("same_programs")

KEY = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Keeps runs by id as W&B does: it takes no step a second time."""

    def __init__(self):
        self.inits, self.rows, self.finished, self.failing = [], {}, 0, None

    def init(self, **arguments):
        self.inits.append(arguments)
        rows = self.rows.setdefault(arguments["id"], {})
        server, started = self, max(rows, default=-1) + 1

        class Run:
            starting_step = started

            def log(self, line, step):
                if server.failing is not None and step >= 3:
                    raise server.failing
                assert step >= max(rows, default=0), "W&B takes steps in order, and would drop this one"
                assert step not in rows or step >= started, "what the run had before it was resumed is written"
                rows.setdefault(step, {}).update(line)

            def finish(self):
                server.finished += 1

        return Run()


@pytest.fixture
def server(monkeypatch):
    """Puts a module in the place of the package, and gives its server."""
    made = Server()
    module = types.ModuleType("wandb")
    module.init, module.Error, module.Settings = made.init, type("Error", (Exception,), {}), lambda **given: given
    names = ("AuthenticationError", "UsageError")
    module.errors = types.SimpleNamespace(**{name: type(name, (module.Error,), {}) for name in names})
    mailbox = types.ModuleType("wandb.sdk.mailbox")
    mailbox.MailboxClosedError, mailbox.HandleAbandonedError = (type(name, (Exception,), {}) for name in ("M", "H"))
    module.sdk = types.ModuleType("wandb.sdk")
    module.sdk.mailbox = mailbox
    for part in (module, module.sdk, mailbox):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model, data = model_directory(root / "model"), preference_file(root / "train.jsonl", 50, seed=1)
    return model, data, preference_file(root / "held_out.jsonl", 5, seed=2)


def config_of(world, root, **train):
    """Twelve steps with an evaluation after every second one; `train` replaces keys of that section."""
    model, data, held_out = world
    sections = {
        "data": {"eval_path": str(held_out)},
        "train": {"wandb_project": "alignment", "epochs": 2, "eval_every_steps": 2, **train},
        "checkpoint": {"every_steps": 4},
        "generation": {"max_new_tokens": 4},
        "cache_dir": str(model.parent / "cache"),
    }
    return make_config(root, model, data, **sections)


CUT_OFF = {
    "in later steps": ("step", 8),  # steps 5 and 6 are in metrics.jsonl, and are done again
    "behind a checkpoint": ("step", 5),  # step 4 is not done again, and no later step has sent its row
    "between the lines of one step": ("evaluation", 6),
}


@pytest.mark.parametrize("where", CUT_OFF)
def test_one_run_with_every_line_once_whatever_cut_it_off(world, server, tmp_path, monkeypatch, where):
    samples = int(where == "between the lines of one step")  # once is enough, as it compiles two programs more
    config, add, evaluate = config_of(world, tmp_path, samples=samples), loop.StepLog.add, loop._evaluate

    def added(self, step, *rest):
        if CUT_OFF[where] == ("step", step):
            raise KeyboardInterrupt
        add(self, step, *rest)

    def evaluated(job, step, *rest):
        if CUT_OFF[where] == ("evaluation", step):
            raise KeyboardInterrupt
        return evaluate(job, step, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.StepLog, "add", added)
        patched.setattr(loop, "_evaluate", evaluated)
        train(config)
    assert train(config) == 0 and train(config) == 0, "a finished run opens none"
    first, second = server.inits
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "alignment"
    assert first["id"] == json.loads((tmp_path / "run" / "manifest.json").read_text())["run_id"]
    (rows,) = server.rows.values()
    expected: dict = {}
    for line in metrics_of(config.output_dir):
        step = line.pop("step")
        expected.setdefault(step, {}).update(line)
    assert rows.keys() == expected.keys() == set(range(1, 13)) and server.finished == 1
    for step, line in expected.items():
        assert rows[step].keys() == line.keys()
        assert rows[step]["loss"] == line["loss"] and rows[step].get("eval/loss") == line.get("eval/loss")
    sent = json.dumps([server.inits, server.rows])
    assert first["config"] == config.model_dump(mode="json") and KEY not in sent
    prompt = json.loads(world[2].read_text().splitlines()[0])["prompt"].splitlines()[0]
    assert prompt not in sent
    if samples:
        assert prompt in (tmp_path / "run" / "samples.jsonl").read_text()
    hidden = first["settings"]
    assert hidden["console"] == "off" and hidden["disable_git"] and hidden["disable_code"] and hidden["x_disable_meta"]


def test_another_run_has_another_id(world, server, tmp_path):
    for name in ("a", "b"):
        assert train(config_of(world, tmp_path / name, max_steps=1)) == 0
    assert len(server.rows) == 2


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"WANDB_API_KEY": ""}, "needs WANDB_API_KEY"),
        ({"WANDB_API_KEY": "", "WANDB_MODE": "online"}, "needs WANDB_API_KEY"),
    ],
)
def test_without_a_key_it_is_refused(server, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=reason):
        require_wandb()


def test_offline_needs_no_key(server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_wandb()


@pytest.mark.parametrize("name", ["AuthenticationError", "UsageError"])
def test_a_key_that_is_refused_is_said_without_it(world, server, tmp_path, monkeypatch, name):
    def refuse(**_):
        raise getattr(sys.modules["wandb"].errors, name)(f"no access with {KEY}")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UsageError, match=r"train\.wandb_project=alignment: W&B refuses") as refused:
        train(config_of(world, tmp_path))
    assert KEY not in str(refused.value)


def outage(kind):
    wandb = sys.modules["wandb"]
    kinds = {"Error": wandb.Error, "closed": wandb.sdk.mailbox.MailboxClosedError, "pipe": BrokenPipeError}
    return kinds[kind](f"timed out with {KEY}")


@pytest.mark.parametrize("kind", ["Error", "closed", "pipe"])
def test_a_run_goes_on_without_a_wandb_that_fails(world, server, tmp_path, kind, caplog, monkeypatch):
    """W&B fails at the start of the run, on the way or at its end: one message, and the run is whole."""
    config, init = config_of(world, tmp_path, max_steps=4), server.init

    def unreachable(**_):
        raise outage(kind)

    def ended_at_the_end(**arguments):
        run = init(**arguments)
        run.finish = unreachable
        return run

    if kind == "Error":
        monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    elif kind == "closed":
        monkeypatch.setattr(sys.modules["wandb"], "init", ended_at_the_end)
    else:
        server.failing = outage(kind)
    assert train(config) == 0
    assert {line["step"] for line in metrics_of(config.output_dir)} == set(range(1, 5))
    said = [record.getMessage() for record in caplog.records if "W&B gets nothing more" in record.getMessage()]
    assert len(said) == 1 and KEY not in said[0] and "timed out" in said[0]


def test_without_the_package_the_extra_is_named(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    path = tmp_path / "config.yaml"
    path.write_text(config_of(world, tmp_path).to_yaml(), encoding="utf-8")
    assert main(["train", str(path)]) == 2
    assert "pip install 'sr_dpo_jax[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
