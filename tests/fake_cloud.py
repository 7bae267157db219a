"""Plays gcloud and kubectl for the tests of tpu_scripts/, records every call, and fails where a test wants it to.

    python fake_cloud.py gcloud|kubectl ARGUMENT...

Its state is `world.json` in the directory $FAKE_CLOUD, which the test writes:

    requests    one list of states for each queued resource to come; every describe moves on by one, and the last stays
    launches    one exit code for each launch to come, {node: code} where the slices differ, and `then`, the state that
                the queued resource has afterwards, and `gone`, as below
    fail        {"GROUP VERB": [exit codes of the next such calls]}
    lost        {"GROUP VERB": [exit codes of the next such calls, which do their work all the same]}
    gone        names of TPUs that are no longer there, though their queued resource still names them
    hosts       workers of a TPU
    node_state  of every TPU
    execute     run the workers' commands for real, with a home directory for each worker under $FAKE_CLOUD

The options that it knows are those of the real `gcloud compute tpus` that the scripts use; others end it with 2. Tests
start it a thousand times, so it imports little.
"""

import fcntl
import json
import os
import sys
from contextlib import contextmanager

ROOT = os.environ["FAKE_CLOUD"]
PLACE = {"--project", "--zone"}
OPTIONS = {
    "queued-resources create": {
        *("--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--spot"),
        *("--reserved", "--service-account", "--valid-until-duration", "--quiet"),
    },
    "queued-resources describe": {"--format"},
    "queued-resources delete": {"--force", "--quiet"},
    "tpu-vm describe": {"--format"},
    "tpu-vm ssh": {"--worker", "--command", "--ssh-flag", "--quiet"},
    "tpu-vm scp": {"--worker", "--scp-flag", "--quiet"},
}


@contextmanager
def world():
    """The state, locked: slices are served at the same time."""
    with open(f"{ROOT}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{ROOT}/world.json") as file:
            state = json.load(file)
        yield state
        with open(f"{ROOT}/world.json", "w") as file:
            json.dump(state, file)


def gcloud(arguments: list[str]) -> int:
    assert arguments[:2] == ["compute", "tpus"], arguments
    call, rest = " ".join(arguments[2:4]), arguments[4:]
    names = [word for word in rest if not word.startswith("-")]
    options = dict((*word.split("=", 1), "")[:2] for word in rest if word.startswith("-"))
    unknown = options.keys() - OPTIONS.get(call, set()) - PLACE
    if call not in OPTIONS or unknown or PLACE - options.keys():
        print(f"ERROR: {call}: unrecognized arguments: {unknown}", file=sys.stderr)
        return 2
    with world() as state:
        if state["fail"].get(call):
            print(f"ERROR: {call}: told to fail", file=sys.stderr)
            return state["fail"][call].pop(0)
        lost = state["lost"].get(call)
        code = lost.pop(0) if lost else 0
    if call.startswith("queued-resources"):
        return queued_resources(call.split()[1], names[0], options) or code
    return tpu_vm(call.split()[1], names, options)


def queued_resources(verb: str, name: str, options: dict[str, str]) -> int:
    with world() as state:
        found = state.get("resource")
        if verb == "create":
            if found:
                print(f"ERROR: ALREADY_EXISTS: {name}", file=sys.stderr)
                return 1
            count = int(options.get("--node-count", 1))
            several = [f"{options.get('--node-prefix')}-{index}" for index in range(count)]
            nodes = several if count > 1 else [options["--node-id"]]
            state["resource"] = {"states": state["requests"].pop(0), "nodes": nodes}
            state["gone"] = []
            return 0
        if not found:
            print(f"ERROR: NOT_FOUND: Resource '{name}' was not found", file=sys.stderr)
            return 1
        if verb == "delete":
            if "--force" not in options:
                print("ERROR: it has nodes", file=sys.stderr)
                return 1
            state["resource"] = None
        elif options["--format"] == "value(state.failedData.error.message)":
            print("there is no capacity")
        elif options["--format"] == "value(state.state)":
            print(found["states"][0])
            found["states"] = found["states"][1:] or found["states"]
        else:
            assert options["--format"] == "value(tpu.nodeSpec[].nodeId)", options
            print(";".join(found["nodes"]))
    return 0


def tpu_vm(verb: str, names: list[str], options: dict[str, str]) -> int:
    with world() as state:
        hosts, execute = state["hosts"], state["execute"]
        found = state.get("resource") or {"nodes": []}
        node = names[-1].split(":")[0]
        if node not in found["nodes"] or node in state["gone"]:
            print(f"ERROR: NOT_FOUND: {node}", file=sys.stderr)
            return 1
        if verb == "describe":
            print({"value(state)": state["node_state"], "value(networkEndpoints.len())": hosts}[options["--format"]])
            return 0
    workers = range(hosts) if options["--worker"] == "all" else [int(options["--worker"])]
    homes = [f"{ROOT}/{node}-{worker}" for worker in workers]
    if not execute:
        return launch(node, options["--command"]) if verb == "ssh" else 0
    if verb == "scp":
        import shutil

        for home in homes:
            target = f"{home}/{names[-1].split(':')[1]}"
            for source in names[:-1]:
                shutil.copy(source, target)  # as scp: into a directory, or under a new name; both must be possible
        return 0
    return 0 if "worker_setup.sh" in options["--command"] else shell(homes, options["--command"])


def shell(homes: list[str], command: str) -> int:
    """Runs the command in all these homes at once; like gcloud, gives the first exit code that is not 0."""
    import subprocess  # takes longer than most calls

    environments = [{"HOME": str(home), "PATH": os.environ["PATH"]} for home in homes]
    started = [
        subprocess.Popen(["bash", "-c", command], cwd=env["HOME"], env=env, stdin=subprocess.DEVNULL)
        for env in environments
    ]
    codes = [process.wait() for process in started]
    return next((code for code in codes if code), 0)


def launch(node: str, command: str) -> int:
    if "worker.sh run" not in command:
        return 0
    with world() as state:
        now = state["launches"][0]
        codes = now["code"]
        if isinstance(codes, dict):
            code = codes.pop(node)
            done = not codes
        else:
            code, done = codes, True
        if done:
            state["launches"].pop(0)
            if "then" in now:
                state["resource"]["states"] = now["then"]
            state["gone"] = now.get("gone", [])
    return code


def kubectl(_arguments: list[str]) -> int:
    with open(f"{ROOT}/kubectl_input", "w") as file:
        file.write(sys.stdin.read())
    with world() as state:
        codes = state["fail"].get("kubectl")
        return codes.pop(0) if codes else 0


if __name__ == "__main__":
    with open(f"{ROOT}/calls.jsonl", "a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit({"gcloud": gcloud, "kubectl": kubectl}[sys.argv[1]](sys.argv[2:]))
