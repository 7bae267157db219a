"""How processes join a run, and what is said where the environment tells of others."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import REPOSITORY, model_directory, preference_file, raw_config, written

from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.parallel import processes

START = {
    "coordinator_address": None,
    "process_id": None,
    "join_timeout_s": 60,
    "heartbeat_timeout_s": 20,
}


@pytest.mark.parametrize(("started", "said"), [(2, None), (1, "sees 1"), (4, "sees 4")])
def test_the_count_of_processes_is_checked(monkeypatch, started, said):
    """jax joins whom it finds, whatever number the configuration names."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **times: joined.append((given, times)))
    monkeypatch.setattr(jax, "process_count", lambda: started)
    if said is None:
        processes.start_distributed(processes=2, **START)
    else:
        with pytest.raises(UsageError, match=f"distributed.processes=2, but jax.distributed {said}"):
            processes.start_distributed(processes=2, **START)
    times = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 20}
    assert joined == [((None, None, None), times)]  # jax detects all three


def test_a_coordinator_that_is_named_is_given_to_jax(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: joined.append(given))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    processes.start_distributed(processes=2, **{**START, "coordinator_address": "a:1", "process_id": 1})
    assert joined == [("a:1", 2, 1)]


def test_a_program_joins_once(monkeypatch):
    """Train, then evaluate, in one program of Python: jax refuses to join a second time."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    processes.start_distributed(processes=2, **START)
    with pytest.raises(UsageError, match=r"distributed\.processes=3, but jax\.distributed sees 2"):
        processes.start_distributed(processes=3, **START)


def test_no_cluster_is_bad_usage(monkeypatch):
    def nothing(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(UsageError, match=r"distributed\.processes=2: jax found no cluster to join"):
        processes.start_distributed(processes=2, **START)


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        (ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS tells of 4"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_SIZE tells of 3"),
        ({"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc"}, "TPU_WORKER_HOSTNAMES tells of 2"),
        (ALLOCATION, None),  # a batch script, or the shell of salloc
        (ALLOCATION | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive step
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"SLURM_STEP_NUM_TASKS": "many"}, None),
    ],
)
def test_one_process_among_several_is_warned_of(monkeypatch, caplog, environment, warned):
    for variable in processes.COUNTED_BY:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    processes.start_distributed(processes=1, **START)
    said = [record.getMessage() for record in caplog.records if record.name == processes.__name__]
    assert [warned in message for message in said] == ([True] if warned else [])


JOIN = """
import os
import sys
from jax._src.clusters import cloud_tpu_cluster, cluster
on_a_tpu = "TPU_WORKER_ID" in os.environ
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = on_a_tpu
import jax
from sr_dpo_jax.parallel import processes
from sr_dpo_jax.errors import UsageError
START = {"coordinator_address": None, "process_id": None, "join_timeout_s": 60, "heartbeat_timeout_s": 20}
try:
    processes.start_distributed(processes=int(sys.argv[1]), **START)
except UsageError as error:
    print(error)
print("joined", jax.process_index(), jax.process_count())
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["Slurm", "GKE"])
def test_jax_finds_the_processes_that_a_scheduler_started(scheduler):
    """Two real processes with a scheduler's variables and no address; the second holds a wrong count."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "TPU_", "XLA_"))
    }
    keep |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port), "TPU_SKIP_MDS_QUERY": "1"}
    started = []
    for number in range(2):
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
        }
        gke = {"TPU_WORKER_ID": str(number), "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1"}
        # Where these are missing jax asks the metadata server of Google Cloud.
        gke |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
        command = [sys.executable, "-c", JOIN, str(2 + number)]
        environment = keep | (slurm if scheduler == "Slurm" else gke)
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert first == "joined 0 2\n"
    assert "distributed.processes=3, but jax.distributed sees 2" in second and second.endswith("joined 1 2\n")


@pytest.fixture
def as_process(monkeypatch):
    """Runs a function as each of several processes in turn, whose collectives see what all of them handed in."""

    def run(number, function, tables):
        monkeypatch.setattr(jax, "process_count", lambda: len(tables))
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda _: np.stack(tables))
        return function()

    return run


def table_of(monkeypatch, facts):
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(processes.multihost_utils, "process_allgather", lambda table: taken.append(table) or table[None])
        processes.require_same(facts)
    return taken[0]


SAME = {"objective.beta": 0.1, "data.path": "abc", "seed": 0}


def test_processes_that_agree_go_on(monkeypatch, as_process):
    tables = [table_of(monkeypatch, facts) for facts in (SAME, dict(reversed(SAME.items())), SAME)]
    for number in range(3):
        as_process(number, lambda: processes.require_same(SAME), tables)


def test_what_differs_is_named_on_every_process(monkeypatch, as_process):
    facts = [SAME, SAME | {"objective.beta": 5.0}, SAME, SAME | {"objective.lam": 1}]
    tables = [table_of(monkeypatch, own) for own in facts]
    said = []
    for number, own in enumerate(facts):
        with pytest.raises(UsageError, match="the processes of this run differ") as refusal:
            as_process(number, lambda own=own: processes.require_same(own), tables)
        said.append(str(refusal.value))
    assert "objective.beta: not on process 1 as on process 0; here 0.1\n" in said[0]
    assert "objective.beta: not on process 1 as on process 0; here 5.0\n" in said[1]
    assert all("a key that process 3 has and this one has not" in text for text in said[:3])
    assert "objective.lam: not on process 3 as on process 0; here 1\n" in said[3]
    assert not any("seed" in text or "data.path" in text for text in said)


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", None)
    processes.require_same(SAME)
    assert processes.text_from_leader("as it is") == "as it is"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(UsageError("wrong key"), UsageError), (OSError(5, "gone"), RunError), (RunError("x"), RunError)],
)
def test_what_stops_process_0_stops_all_with_its_message(monkeypatch, error, kind):
    told = []

    def broadcast(array):
        told.append(np.asarray(array)) if jax.process_index() == 0 else None
        return told[-1]

    def work():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(processes, "largest", lambda size: max(size, *map(len, told)) if told else size)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(type(error)):
        processes.on_leader(work)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(kind, match=f"process 0 has stopped with {type(error).__name__}: "):
        processes.on_leader(work)


def test_what_fails_on_one_process_stops_all(monkeypatch):
    """The second of three cannot write; the others say which one it was."""

    def ask(number, work):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        handed = []
        monkeypatch.setattr(processes, "largest", lambda value: handed.append(value) or max(value, *others))
        try:
            processes.everywhere(work)
        finally:
            others.append(handed[0])

    def work():
        raise UsageError("no permission")

    others = [0, 0]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UsageError, match="no permission"):
        ask(1, work)
    for number in (0, 2):
        with pytest.raises(UsageError, match="process 1 has stopped, and its own message says why"):
            ask(number, lambda: None)
    others = [0, 0]
    ask(0, lambda: None)


def test_a_place_for_compiled_programs_that_the_user_has_set_stays(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    processes.keep_compiled(tmp_path)  # the tests have a place of their own
    assert updates == {}
    with jax._src.config.compilation_cache_dir(None):
        processes.keep_compiled(tmp_path)
        assert str(updates["jax_compilation_cache_dir"]).startswith(str(tmp_path / "compiled-"))
        updates.clear()
        with jax._src.config.enable_compilation_cache(False):
            processes.keep_compiled(tmp_path)
    assert updates == {}


COMPILES = """
import collections, json, sys
import jax
from sr_dpo_jax.cli import main
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
code = main(["train", sys.argv[1], f"output_dir={sys.argv[2]}"])
print(json.dumps({"code": code, "hits": counts["cache_hits"]}))
"""


@pytest.mark.slow
def test_the_second_start_compiles_no_program_of_the_first(tmp_path):
    """Each in a process of its own, with the cache that a run has by default."""
    raw = raw_config(tmp_path, model_directory(tmp_path / "model"), preference_file(tmp_path / "train.jsonl", 16))
    path = written(tmp_path, raw)
    unset = (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "JAX_COMPILATION_CACHE_MAX_SIZE",
    )
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    found = []
    for start in ("first", "second"):
        command = [sys.executable, "-c", COMPILES, path, str(tmp_path / start)]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["code"] == 0, done.stderr
        found.append((said["hits"], {path.name for path in (tmp_path / "cache").glob("compiled-*/*-cache")}))
    (no_hits, first), (hits, second) = found
    assert no_hits == 0 and first and first == second and hits == len(first)
