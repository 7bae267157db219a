"""Queued resources and the runs launched on them: which calls of gcloud, in which order, and how failures end."""

import re

import pytest
from cloud_scripts import PLACE, TPU, arguments_of, command_of, step_of


def test_create_waits_until_it_is_given(cloud):
    cloud.prepare(requests=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    cloud.run("create.sh", *PLACE, *TPU, "--spot")
    assert cloud.steps == ["create"]
    place = ["--project=test-project", "--zone=test-zone1-a", "--quiet"]
    wanted = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", *TPU, "--spot", *place]
    assert cloud.calls[1] == wanted


def test_create_asks_again_until_it_is_given(cloud):
    cloud.prepare(requests=[["PROVISIONING", "FAILED"], ["WAITING_FOR_RESOURCES", "SUSPENDED"], ["ACTIVE"]])
    done = cloud.run("create.sh", *PLACE, *TPU, "--reserved")
    assert cloud.steps == ["create", "delete", "create", "delete", "create"]
    assert "--reserved" in cloud.calls[1] and done.stderr.count("there is no capacity") == 1
    assert re.findall("pod: (.*)", done.stderr) == [
        *("NONE", "PROVISIONING", "FAILED", "NONE", "WAITING_FOR_RESOURCES", "SUSPENDED", "NONE", "ACTIVE")
    ]


def test_create_leaves_alone_what_is_given(cloud):
    cloud.has("pod")
    cloud.run("create.sh", *PLACE, *TPU)
    assert cloud.steps == []


def test_create_gives_back_what_was_preempted_before_the_queue_says_so(cloud):
    cloud.has("pod", node_state="PREEMPTED", requests=[["FAILED"]])
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=1", code=1)  # the fake has no second request
    assert cloud.steps[:2] == ["delete", "create"]
    assert "pod: PREEMPTED" in done.stderr


def test_a_node_that_is_gone_is_preempted(cloud):
    cloud.has("pod", gone=["pod"])
    assert cloud.run("status.sh", *PLACE).stdout == "pod: PREEMPTED\n"


def test_a_request_whose_answer_was_lost_is_found(cloud):
    cloud.prepare(requests=[["ACTIVE"]], lost={"queued-resources create": [1]})
    cloud.run("create.sh", *PLACE, *TPU)
    assert cloud.steps == ["create"]


def test_requests_that_always_fail_end_it(cloud):
    cloud.prepare(requests=[["FAILED"]] * 9)
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=3", code=1)
    assert cloud.steps == ["create", "delete"] * 3
    assert (
        done.stderr.count("has failed: there is no capacity") == 3 and "3 requests in a row have failed" in done.stderr
    )


def test_a_preemption_between_forgives_failed_requests(cloud):
    cloud.prepare(requests=[["FAILED"], ["SUSPENDED"], ["FAILED"], ["ACTIVE"]])
    cloud.run("create.sh", *PLACE, *TPU, "--tries=2")


def test_what_is_not_there_counts_as_deleted(cloud):
    done = cloud.run("delete.sh", *PLACE)
    assert done.stdout == "pod is not there\n" and "NOT_FOUND" not in done.stderr


@pytest.mark.parametrize("call", ["queued-resources create", "queued-resources describe", "queued-resources delete"])
def test_a_failing_gcloud_is_tried_again_a_few_times(cloud, call):
    cloud.prepare(requests=[["FAILED"], ["ACTIVE"]], fail={call: [1, 1]})
    cloud.run("create.sh", *PLACE, *TPU, "--tries=3")
    cloud.prepare(requests=[["FAILED"], ["ACTIVE"]], fail={call: [1, 1, 7]})
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=3", code=7)
    assert f"ERROR: {call}: told to fail" in done.stderr


def test_pauses_double_up_to_a_limit(cloud):
    cloud.prepare(fail={"queued-resources create": [1] * 9})
    cloud.run("create.sh", *PLACE, *TPU, "--tries=8", "--poll-s=3", code=1)
    assert cloud.pauses == [3, 6, 12, 24, 48, 48, 48]


@pytest.mark.parametrize(
    ("script", "call"),
    [
        ("setup.sh", "tpu-vm ssh"),
        ("setup.sh", "tpu-vm scp"),
        ("launch.sh", "tpu-vm describe"),
        ("launch.sh", "tpu-vm scp"),
        ("launch.sh", "tpu-vm ssh"),
        ("status.sh", "queued-resources describe"),
        ("status.sh", "tpu-vm describe"),
        ("status.sh", "tpu-vm ssh"),
        ("logs.sh", "queued-resources describe"),
        ("logs.sh", "tpu-vm ssh"),
        ("stop.sh", "queued-resources describe"),
        ("stop.sh", "tpu-vm ssh"),
        ("delete.sh", "queued-resources delete"),
        ("jobset.sh", "kubectl"),
    ],
)
def test_no_failure_is_swallowed(cloud, script, call):
    cloud.has("pod", launches=[{"code": 0}], fail={call: [5] * 9})
    tries = ["--tries=1"] if script in ("setup.sh", "launch.sh") else []
    cloud.run(script, *arguments_of(cloud, script), *tries, code=5)


def test_several_slices(cloud):
    cloud.run("create.sh", *PLACE, *TPU, "--slices=3")
    assert {"--node-count=3", "--node-prefix=pod"} <= set(cloud.call("create"))
    cloud.has("pod-0", "pod-1", "pod-2", hosts=4, launches=[{"code": {"pod-0": 0, "pod-1": 0, "pod-2": 0}}])
    cloud.run("launch.sh", *PLACE, cloud.config, "mesh.replica=3")
    launched = [call for call in cloud.calls if step_of(call) == "ssh run"]
    assert sorted(call[5] for call in launched) == ["pod-0", "pod-1", "pod-2"]
    assert all("--worker=all" in call for call in launched)
    assert len({tuple(command_of(call)) for call in launched}) == 1  # one attempt, one command
    assert command_of(launched[0])[-2:] == ["distributed.processes=12", "mesh.replica=3"]
    cloud.run("logs.sh", *PLACE, "--slice=2", "--worker=1", "--lines=7")
    assert cloud.calls[-1][5:7] == ["pod-2", "--worker=1"] and command_of(cloud.calls[-1])[:3] == ["tail", "-n", "7"]
    assert "no slice 3" in cloud.run("logs.sh", *PLACE, "--slice=3", code=2).stderr


@pytest.mark.parametrize(
    ("codes", "ends"),
    [((0, 0), 0), ((75, 0), 75), ((1, 75), 75), ((255, 75), 75), ((75, 2), 2), ((2, 1), 2), ((0, 255), 255)],
)
def test_the_gravest_slice_decides(cloud, codes, ends):
    cloud.has("pod-0", "pod-1", launches=[{"code": {"pod-0": codes[0], "pod-1": codes[1]}}])
    cloud.run("launch.sh", *PLACE, cloud.config, code=ends)


def test_overrides_reach_the_worker_as_they_are(cloud):
    cloud.has("pod", launches=[{"code": 0}])
    overrides = ['data.path=[{path: a b, weight: 2}, "c"]', "refinement.prompt=it's $HOME `x` \\ *", "mesh.fsdp=-1"]
    cloud.run("launch.sh", *PLACE, "--processes=2", cloud.config, *overrides)
    assert command_of(cloud.call("ssh run"))[-4:] == ["distributed.processes=2", *overrides]
