"""The supervisor keep_running.sh: preemptions, failures and deletion."""

import pytest
from cloud_scripts import ROUND, command_of, step_of


def test_preempted_created_again_and_resumed(cloud):
    cloud.prepare(
        requests=[["PROVISIONING", "ACTIVE"], ["ACTIVE"]],
        launches=[{"code": 75, "then": ["SUSPENDING", "SUSPENDED"]}, {"code": 0}],
    )
    done = cloud.keep_running("objective.lam=0.3")
    assert cloud.steps == [*ROUND, "delete", *ROUND]
    first, second = [command_of(call) for call in cloud.calls if step_of(call) == "ssh run"]
    assert first[4:] == second[4:] and first[-1] == "objective.lam=0.3"  # the same command
    assert first[3] != second[3]  # another attempt
    assert "preempted: the run ended with 75, pod is SUSPENDING" in done.stderr


def test_a_tpu_that_vanishes_without_75_is_a_preemption(cloud):
    """It is created again without limit, more often than failures are allowed."""
    gone = [{"code": 255, "then": ["SUSPENDED"]}] * 3
    cloud.prepare(requests=[["ACTIVE"]] * 4, launches=[*gone, {"code": 0}])
    cloud.keep_running("--tries=2")
    assert cloud.steps == [*ROUND, *["delete", *ROUND] * 3]


def test_75_of_a_tpu_that_is_still_there_launches_again_on_it(cloud):
    cloud.prepare(launches=[{"code": 75}, {"code": 0}])
    cloud.keep_running()
    assert cloud.steps == [*ROUND, *ROUND[1:]]


def test_bad_config_ends_at_once(cloud):
    cloud.prepare(launches=[{"code": 2}])
    cloud.keep_running(code=2)
    assert cloud.steps == ROUND


def test_too_many_failures_end_it(cloud):
    cloud.prepare(launches=[{"code": 1}] * 9)
    done = cloud.keep_running(code=1)
    assert cloud.steps == [*ROUND, *ROUND[1:], *ROUND[1:]]
    assert "failed with 1, 2 of 3 times" in done.stderr
    assert cloud.pauses == [30, 30, 60]  # until it was given; after the first failure; after the second


def test_a_preemption_between_forgives_failures(cloud):
    cloud.prepare(launches=[{"code": 1}, {"code": 75}, {"code": 1}, {"code": 0}])
    cloud.keep_running("--tries=2")


def test_a_tpu_that_is_never_given_ends_it(cloud):
    cloud.prepare(fail={"queued-resources create": [1] * 99})
    cloud.keep_running(code=1)
    assert set(cloud.steps) == {"create"} and len(cloud.steps) == 9  # three rounds of three


@pytest.mark.parametrize(("code", "then"), [(0, 0), (2, 2)])
def test_delete_when_done(cloud, code, then):
    cloud.prepare(launches=[{"code": code}])
    cloud.keep_running("--delete-when-done", code=then)
    assert cloud.steps == [*ROUND, "delete"]


def test_nothing_to_delete_delays_no_end(cloud):
    cloud.prepare(fail={"queued-resources create": [2]})
    cloud.keep_running("--delete-when-done", code=2)
    assert cloud.steps == ["create", "delete"]
    assert not (cloud.root / "pauses").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_a_failing_delete_is_warned_of_and_changes_no_exit_code(cloud, code):
    cloud.prepare(launches=[{"code": code}], fail={"queued-resources delete": [1] * 9})
    done = cloud.keep_running("--delete-when-done", code=code)
    assert cloud.steps == [*ROUND, *["delete"] * 3]
    assert "--delete-when-done: pod could not be deleted and may still cost" in done.stderr


def test_a_node_that_is_gone_while_the_queue_says_active_is_a_preemption(cloud):
    """It is created again without limit, like every other preempted TPU."""
    cloud.prepare(requests=[["ACTIVE"]] * 4, launches=[*[{"code": 255, "gone": ["pod"]}] * 3, {"code": 0}])
    cloud.keep_running("--tries=2")
    assert cloud.steps == [*ROUND, *["delete", *ROUND] * 3]


def test_what_it_is_told_reaches_the_scripts(cloud):
    cloud.prepare(launches=[{"code": {"pod-0": 0, "pod-1": 0}}])
    told = ["--slices=2", "--spot", "--service-account=a@b.c", "--valid-until-duration=6h", "--python=3.13"]
    more = ["--share=10.0.0.2:/runs", "--mount=/mnt/disk", f"--token-file={cloud.config}", "output_dir=/mnt/disk/run"]
    cloud.keep_running(*told, *more)
    assert {"--node-count=2", "--spot", *told[2:4]} <= set(cloud.call("create"))
    wheel = cloud.package.name
    assert command_of(cloud.call("ssh worker_setup"))[2:] == [wheel, "3.13", "10.0.0.2:/runs", "/mnt/disk"]
    assert any(call[4:8] == ["scp", str(cloud.config), "pod-1:.cache/huggingface/token", "--worker=all"]
               for call in cloud.calls)  # fmt: skip
