"""The manifest for GKE: valid, whole, and restarted by the exit codes."""

import json
import re

import jsonschema
import pytest
import yaml
from cloud_scripts import GKE, ROOT, job_of, manifest_of

EVERYTHING = ["--slices=2", "--spot", "--queue=multislice-queue", "--service-account=an-account"]
EVERYTHING += ["--token-secret=a-secret", "--namespace=a-space", "--max-restarts=3"]


def check(document: dict) -> None:
    """Raises unless the document is valid by the schema of its kind."""
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text(encoding="utf-8"))
    kind = {"ConfigMap": "configMap", "JobSet": "jobSet"}[document["kind"]]
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}).validate(document)


@pytest.mark.parametrize("arguments", [[], EVERYTHING], ids=["least", "everything"])
def test_manifest_is_valid(cloud, arguments):
    for document in manifest_of(cloud, *arguments):
        check(document)


def test_schema_refuses_what_a_cluster_would(cloud):
    _, job_set = manifest_of(cloud)
    job, pod = job_of(job_set), job_of(job_set)["template"]["spec"]
    for place, key, value in [
        (job_set["spec"]["failurePolicy"], "maxRestart", 3),
        (job_set["spec"]["failurePolicy"]["rules"][0], "action", "RestartAll"),
        (job_set["spec"]["failurePolicy"]["rules"][0], "name", "bad-usage"),
        (job["podFailurePolicy"]["rules"][0]["onExitCodes"], "values", [0]),
        (job, "completions", "4"),
        (pod, "restartPolicy", "Always"),
        (pod["nodeSelector"], "cloud.google.com/gke-spot", True),
    ]:
        before = dict(place)
        place[key] = value
        with pytest.raises(jsonschema.ValidationError):
            check(job_set)
        place.clear()
        place.update(before)
    check(job_set)


def test_manifest_holds_together(cloud):
    """The manifest fulfils what the API server and the controllers require across fields."""
    config_map, job_set = manifest_of(cloud, *EVERYTHING)
    assert config_map["metadata"] == {"name": "pod", "namespace": "a-space"}
    assert job_set["metadata"]["namespace"] == "a-space"
    assert job_set["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "multislice-queue",
        "xpk.google.com/workload": "pod",
    }
    assert job_set["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert job_set["spec"]["replicatedJobs"][0]["replicas"] == 2
    job = job_of(job_set)
    assert job["completions"] == job["parallelism"] == 4 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy is refused with another
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["serviceAccountName"] == "an-account"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (main,) = pod["containers"]
    assert main["resources"]["limits"] == {"google.com/tpu": 4}
    assert main["command"] == ["sr-dpo"] and main["args"][-1] == "distributed.processes=8"
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "a-secret", "key": "token"}}} in main["env"]
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": [], "containerName": "main"})
        assert codes["containerName"] == main["name"] and codes["values"] == sorted(codes["values"])
    mounted = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert volumes["share"]["persistentVolumeClaim"]["claimName"] == "a-claim"
    assert main["args"][1] == f"{mounted['config']}/{next(iter(config_map['data']))}"
    assert yaml.safe_load(config_map["data"]["config.yaml"])["output_dir"].startswith(mounted["share"] + "/")


def outcome(job_set: dict, code: int, *, disrupted: bool = False, others: tuple[int, ...] = ()) -> str:
    """Gives what happens when the first pod of a slice ends with `code`, by the rules of Job and JobSet.

    The Job: the first podFailurePolicy rule that matches decides; FailJob fails it with reason PodFailurePolicy and a
    message of fixed form, and without a match backoffLimit 0 is exceeded. The JobSet: its rules in order, each over all
    failed Jobs; without a match, RestartJobSet. `others` are the exit codes of other slices.
    """
    job, failed = job_of(job_set), []
    for number, ended in enumerate((code, *others)):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            conditions = {(item["type"], item["status"]) for item in rule.get("onPodConditions", [])}
            end = f"matching {rule['action']} rule at index {index}"
            if codes and (ended in codes["values"]) == (codes["operator"] == "In"):
                message = (
                    f"Container main for pod default/pod-slice-job-{number}-0-x1y2z failed with exit code {ended} {end}"
                )
            elif disrupted and number == 0 and ("DisruptionTarget", "True") in conditions:
                message = f"Pod default/pod-slice-job-{number}-0-x1y2z has condition DisruptionTarget {end}"
            else:
                continue
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
        failed.append((reason, message))
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        for reason, message in failed:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
    return "RestartJobSet"


def test_restart_policy_understands_the_exit_codes(cloud):
    _, job_set = manifest_of(cloud)
    assert job_of(job_set)["backoffLimit"] == 0
    assert outcome(job_set, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 2) == "FailJobSet"
    for code in (1, 12, 22, 42, 127, 134, 137, 139, 143, 255):
        assert outcome(job_set, code) == "RestartJobSet"
    assert outcome(job_set, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, others=(1,)) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, others=(2,)) == "FailJobSet"


def test_preemptions_that_look_like_failures_do_not_end_it(cloud):
    """A pod whose node dies makes its peers fail, perhaps before it is marked; each such time counts."""
    _, job_set = manifest_of(cloud)
    assert outcome(job_set, 1, others=(1,)) == "RestartJobSet"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 100


def test_config_and_overrides_reach_the_pods_as_they_are(cloud):
    cloud.config.write_text(
        '  # indented, "quoted" and \\ {{NAME}} & |\noutput_dir: /mnt/sr_dpo/run\n\n\nlast: |\n  it\'s\n'
    )
    overrides = ['data.path=[{path: "a b"}]', "refinement.prompt=it's \\ & | {{NAME}} é", "mesh.fsdp=-1"]
    config_map, job_set = manifest_of(cloud, *overrides)
    assert config_map["data"]["config.yaml"] == cloud.config.read_text()
    (main,) = job_of(job_set)["template"]["spec"]["containers"]
    assert main["args"] == ["train", "/etc/sr_dpo/config.yaml", "distributed.processes=4", *overrides]


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"), [("4x4", 4, 4), ("2x4", 8, 1), ("2x2x2", 4, 2), ("4x4x8", 4, 32), ("16x16", 4, 64)]
)
def test_hosts_of_a_slice(cloud, topology, chips, hosts):
    _, job_set = manifest_of(cloud, f"--topology={topology}", f"--chips={chips}")
    assert job_of(job_set)["completions"] == hosts
    assert job_of(job_set)["template"]["spec"]["containers"][0]["args"][2] == f"distributed.processes={hosts}"


def test_apply_hands_the_printed_manifest_to_kubectl(cloud):
    printed = cloud.run("jobset.sh", *GKE, cloud.config).stdout
    assert cloud.calls == []
    cloud.run("jobset.sh", *GKE, cloud.config, "--apply")
    assert cloud.calls == [["kubectl", "apply", "--filename=-"]]
    assert (cloud.root / "kubectl_input").read_text() == printed


def test_the_longest_name_of_a_job_set_passes(cloud):
    """JobSet's pods are NAME-slice-job-SLICE-HOST and five letters."""
    _, job_set = manifest_of(cloud, f"--name={'a' * 43}")
    assert len(f"{job_set['metadata']['name']}-slice-job-0-3-xxxxx") == 63
