"""The DAG on Argo Workflows alone: the same steps, edges and values as on KFP, in objects that Argo's types take."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hera.workflows import models
from spectraqlora.errors import InputError
from spectraqlora.runtime import command_line
from spectraqlora.settings import parse
from spectraqlora_pipelines.cluster.argo_pods import ACCOUNT, FINAL, STOP, not_argos, pod_of
from spectraqlora_pipelines.cluster.values import ArgoValues, ClusterValues, read_values
from spectraqlora_pipelines.dags.argo import manifest, read_template, template_for, text, workflow_template
from spectraqlora_pipelines.dags.argo_runs import cron_workflow, workflow
from spectraqlora_pipelines.dags.catalogue import Dag

from tests.unit.compiled_dag import compiled_from

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CASES: dict[str, tuple[Dag, dict[str, Any]]] = {
    "ablation": ("ablation", {"methods": "qlora,hybrid,random", "rounds": 2}),
    "retraining": ("retraining", {"retrain": {"method": "hybrid", "start": "champion"}, "rounds": 2}),
    "quantized": ("ablation", {"methods": "sgm", "snr": {"source": "quantized"}}),
}
_REFERENCE = re.compile(r"\{\{([^}]+)\}\}")


@cache
def made(case: str, values: str = "values-full.yaml") -> dict[str, Any]:
    kind, settings = CASES[case]
    return template_for(kind, parse(settings), read_values(GOLDEN / values))


def templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {template["name"]: template for template in document["spec"]["templates"]}


def one_step(values: str, step: str, folder: Path) -> dict[str, Any]:
    """A step's template under these values."""
    (folder / "values.yaml").write_text(values)
    pipeline = compiled_from("ablation", {"methods": "hybrid"}).document
    document = workflow_template(pipeline, read_values(folder / "values.yaml"))
    return next(
        t for t in templates(document).values() if t.get("container", {}).get("args", [""])[0] == step
    )


class Walk:
    """A WorkflowTemplate followed as Argo's controller follows it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.templates = templates(document)
        spec = document["spec"]
        given = {p["name"]: p["value"] for p in spec["arguments"]["parameters"]}
        self.world = {f"workflow.parameters.{name}": value for name, value in given.items()}
        self.world |= {"workflow.status": "Succeeded"}
        self.tasks: dict[str, dict[str, dict[str, str]]] = {}
        self.order: dict[str, list[str]] = {}
        self.dag(spec["entrypoint"], {}, {})
        for hook in spec.get("hooks", {}).values():
            self.call(hook["template"], hook, {}, hook["template"])

    def dag(self, name: str, parameters: dict[str, str], artifacts: dict[str, str]) -> dict[str, str]:
        """Follow a DAG with its inputs; its output artifacts by name."""
        template = self.templates[name]
        here = {f"inputs.parameters.{key}": value for key, value in parameters.items()}
        here |= {f"inputs.artifacts.{key}": value for key, value in artifacts.items()}
        for task in template["dag"]["tasks"]:
            known = {reference.split(".")[1] for reference in here if reference.startswith("tasks.")}
            assert set(task.get("dependencies", [])) <= known, "a task comes after those that it needs"
            outputs = self.call(task["template"], task, here, task["name"])
            here |= {f"tasks.{task['name']}.outputs.{key}": value for key, value in outputs.items()}
            here[f"tasks.{task['name']}"] = ""
        return {
            f"artifacts.{entry['name']}": here[_REFERENCE.fullmatch(entry["from"])[1]]  # type: ignore[index]
            for entry in template.get("outputs", {}).get("artifacts", [])
        }

    def call(self, name: str, task: dict[str, Any], here: dict[str, str], label: str) -> dict[str, str]:
        template, handed = self.templates[name], task.get("arguments", {})
        seen = {**self.world, **here}

        def resolved(value: str) -> str:
            return _REFERENCE.sub(lambda match: seen[match[1]], value)

        parameters = {p["name"]: resolved(p["value"]) for p in handed.get("parameters", [])}
        artifacts = {a["name"]: resolved(a["from"]) for a in handed.get("artifacts", [])}
        wanted = template.get("inputs", {})
        needed = {p["name"] for p in wanted.get("parameters", []) if "value" not in p}
        assert needed <= parameters.keys() <= {p["name"] for p in wanted.get("parameters", [])}, name
        assert artifacts.keys() == {a["name"] for a in wanted.get("artifacts", [])}, name
        if "dag" in template:
            return self.dag(name, parameters, artifacts)
        defaults = {p["name"]: p["value"] for p in wanted.get("parameters", []) if "value" in p}
        arguments = [
            _REFERENCE.sub(lambda match: {**defaults, **parameters}[match[1].rpartition(".")[2]], part)
            for part in template["container"]["args"]
        ]
        step = arguments[0]
        self.tasks[label] = {"reads": artifacts, "values": {**defaults, **parameters}}
        self.order[label] = arguments
        written = template["outputs"]
        return {
            **{f"artifacts.{a['name']}": f"{step}.{a['name']}" for a in written["artifacts"]},
            **{f"parameters.{p['name']}": f"{label}.{p['name']}" for p in written.get("parameters", [])},
        }


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


@pytest.mark.parametrize("case", CASES)
def test_every_step_reads_and_is_told_what_it_is_on_kfp(case: str) -> None:
    kind, settings = CASES[case]
    ours = Walk(made(case)).tasks
    theirs = {slug(task.name): task for task in compiled_from(kind, settings).tasks()}
    assert ours.keys() == theirs.keys()
    for label, task in theirs.items():
        assert ours[label]["reads"] == task.reads, label
        for name, value in task.values.items():
            if name == "status":
                assert ours[label]["values"][name] == "Succeeded"
            elif name == "origin":
                assert set(json.loads(ours[label]["values"][name])) == set(value)
            else:
                assert ours[label]["values"][name] == text(value), (label, name)


@pytest.mark.parametrize("case", CASES)
def test_every_steps_command_line_takes_its_arguments(case: str) -> None:
    for label, arguments in Walk(made(case)).order.items():
        step, *rest = arguments
        function = command_line.component(step)
        given = vars(command_line.parser(step, function).parse_args(rest))
        for option in command_line.options(function):
            value = given[option.name]
            if option.kind in ("output", "text"):
                assert value == f"/outputs/{option.name}", (label, option.name)
            elif option.kind in ("dict", "int", "float"):
                json.loads(value)


def unlike(given: Any, understood: Any, path: str = "") -> list[str]:
    """Where what was given is not what Argo's types made of it: keys that they do not know are dropped."""
    if isinstance(given, dict) and isinstance(understood, dict):
        lost = [f"{path}.{key}" for key in given.keys() ^ understood.keys()]
        both = given.keys() & understood.keys()
        return lost + [
            entry for key in both for entry in unlike(given[key], understood[key], f"{path}.{key}")
        ]
    if isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        pairs = enumerate(zip(given, understood, strict=True))
        return [entry for number, pair in pairs for entry in unlike(*pair, f"{path}[{number}]")]
    return [] if given == understood else [path]


def as_argo_reads(kind: Any, document: dict[str, Any]) -> list[str]:
    read = kind(**document).model_dump(exclude_unset=True, by_alias=True, mode="json")
    return unlike(document, read)


@pytest.mark.parametrize("case", CASES)
def test_argos_types_take_the_template_with_nothing_unknown_in_it(case: str) -> None:
    document = made(case)
    assert as_argo_reads(models.WorkflowTemplate, document) == []
    document = json.loads(json.dumps(document))
    document["spec"]["templates"][-1]["container"]["volumMounts"] = []
    assert as_argo_reads(models.WorkflowTemplate, document) == [
        f".spec.templates[{len(document['spec']['templates']) - 1}].container.volumMounts"
    ]


def test_argos_types_take_a_run_and_a_schedule() -> None:
    arguments = {"seed": 7, "train": {"max_steps": 20}, "source": "s3://b/c"}
    template = made("ablation")
    run = workflow(template, "mine", arguments)
    assert as_argo_reads(models.Workflow, run) == []
    given = {entry["name"]: entry["value"] for entry in run["spec"]["arguments"]["parameters"]}
    assert given["train"] == '{"max_steps": 20}' and given["seed"] == "7"
    others = {entry["name"]: entry["value"] for entry in template["spec"]["arguments"]["parameters"]}
    assert {name: value for name, value in given.items() if name not in arguments} == {
        name: value for name, value in others.items() if name not in arguments
    }
    assert run["spec"]["templates"] == template["spec"]["templates"], "no lookup by name, which may be behind"
    values = ArgoValues(timezone="Europe/Berlin")
    schedule = cron_workflow("nightly", "spectraqlora-nightly", arguments, "0 3 * * *", values, owner="me")
    assert as_argo_reads(models.CronWorkflow, schedule) == []
    spec = schedule["spec"]
    assert (spec["concurrencyPolicy"], spec["timezone"], spec["suspend"]) == (
        "Forbid",
        "Europe/Berlin",
        False,
    )
    assert spec["workflowSpec"]["synchronization"]["mutexes"] == [{"name": "spectraqlora-nightly"}]


def test_a_condition_becomes_when_and_what_is_nested_a_template_of_its_own() -> None:
    found = templates(made("retraining"))
    tasks = {task["name"]: task for task in found["all-steps"]["dag"]["tasks"]}
    assert tasks["something-changed"]["when"] == (
        "'{{tasks.detect-changes.outputs.parameters.Output}}' != 'unchanged'"
    )
    assert [task["name"] for task in found["branch-hybrid"]["dag"]["tasks"]] == [
        "select-layers-hybrid", "start-point-hybrid", "train-hybrid-round-1", "re-evaluate-hybrid-round-1",
        "train-hybrid-round-2", "re-evaluate-hybrid-round-2",
    ]  # fmt: skip


def test_close_runs_is_the_exit_hook_and_hears_how_the_run_ended() -> None:
    hook = made("ablation")["spec"]["hooks"]["exit"]
    assert hook["template"] == "close-runs"
    told = {entry["name"]: entry["value"] for entry in hook["arguments"]["parameters"]}
    assert told == {
        "status": "{{workflow.status}}",
        "tracking_settings": "{{workflow.parameters.tracking}}",
    }


def test_the_values_file_places_a_step() -> None:
    train = templates(made("ablation"))["train-hybrid"]
    container = train["container"]
    assert container["resources"] == {
        "requests": {"cpu": "500m", "memory": "24Gi"},
        "limits": {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"},
    }
    assert container["image"].startswith("registry.example.com/ml/spectraqlora/train@sha256:0123")
    assert train["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert train["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 60},
    ]
    assert train["activeDeadlineSeconds"] == 86400
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["SPECTRAQLORA_RUN_KEY"]["value"] == "{{workflow.uid}}"
    assert variables["SPECTRAQLORA_IMAGE_REFERENCE"]["value"] == container["image"]
    assert (variables["SPECTRAQLORA_CPUS"]["value"], variables["HF_HOME"]["value"]) == (
        "1",
        "/hub/huggingface",
    )
    assert variables["AWS_ACCESS_KEY_ID"]["valueFrom"] == {
        "secretKeyRef": {"name": "s3-credentials", "key": "access_key", "optional": False}
    }
    assert "HF_TOKEN" not in variables, "training asks no hub"
    assert train["metadata"]["labels"] == {
        "team": "nlp", "spectraqlora/step": "train", "spectraqlora/method": "hybrid",
    }  # fmt: skip
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in train["volumes"]
    spec = made("ablation")["spec"]
    assert (spec["serviceAccountName"], spec["activeDeadlineSeconds"]) == ("spectraqlora", 172800)
    assert spec["artifactGC"]["serviceAccountName"] == "spectraqlora"
    assert spec["ttlStrategy"] == {"secondsAfterCompletion": 604800}
    assert spec["imagePullSecrets"] == [{"name": "registry-credentials"}]


def test_volumes_and_files_are_mounted_under_names_that_cannot_meet(tmp_path: Path) -> None:
    values = """
defaults:
  secrets: [{name: outputs, mount: /etc/s3}]
  config_maps: [{name: company-ca, mount: /etc/ca, optional: true}]
  cache: {claim: tmp, sub_path: team}
  scratch: {size: 5Gi, path: /scratch, storage_class: fast}
  affinity:
    - rules: [{key: zone, values: [a, b]}]
    - {weight: 5, rules: [{key: nvme, operator: Exists}]}
"""
    step = one_step(values, "train", tmp_path)
    mounts = {mount["mountPath"]: mount for mount in step["container"]["volumeMounts"]}
    named = ["/cache", "/dev/shm", "/etc/ca", "/etc/s3", "/outputs", "/scratch", "/tmp", ACCOUNT]
    assert sorted(mounts) == named
    volumes = {volume["name"]: volume for volume in step["volumes"]}
    assert len(volumes) == len(step["volumes"]) == len(mounts)
    assert volumes[mounts["/etc/s3"]["name"]]["secret"] == {"secretName": "outputs", "optional": False}
    assert volumes[mounts["/cache"]["name"]]["persistentVolumeClaim"] == {"claimName": "tmp"}
    assert mounts["/cache"]["subPath"] == "team" and mounts["/etc/ca"]["readOnly"]
    claim = volumes["scratch"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["storageClassName"] == "fast" and claim["resources"] == {"requests": {"storage": "5Gi"}}
    affinity = step["affinity"]["nodeAffinity"]
    assert affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}
    ]
    assert affinity["preferredDuringSchedulingIgnoredDuringExecution"] == [
        {"weight": 5, "preference": {"matchExpressions": [{"key": "nvme", "operator": "Exists"}]}}
    ]


def test_every_step_is_told_before_its_pod_is_deleted() -> None:
    """What the hook does is tried on a cluster: `tests/cluster/test_ablation_on_argo.py`."""
    compile(STOP, "stop", "exec")
    steps = [t["container"] for t in templates(made("retraining")).values() if "container" in t]
    assert steps
    for container in steps:
        assert container["lifecycle"] == {"preStop": {"exec": {"command": ["python3", "-c", STOP]}}}


def test_no_step_runs_as_root_or_writes_elsewhere_than_in_its_volumes(tmp_path: Path) -> None:
    for template in templates(made("retraining", "values-minimal.yaml")).values():
        if "container" not in template:
            continue
        pod, container = template["securityContext"], template["container"]["securityContext"]
        assert pod["runAsUser"] == 10001 and pod["runAsNonRoot"] and pod["fsGroup"] == 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True, "runAsNonRoot": True,
        }  # fmt: skip
        mounted = {mount["mountPath"] for mount in template["container"]["volumeMounts"]}
        assert {"/outputs", "/tmp"} <= mounted
    openshift = "argo: {fs_group: null, grace: 5m}\ndefaults: {user: {run_as_user: 1000650000}}"
    step = one_step(openshift, "train", tmp_path)
    pod, same = step["securityContext"], {"securityContext": {"runAsUser": 1000650000}}
    assert json.loads(step["podSpecPatch"]) == {
        "terminationGracePeriodSeconds": 300,
        "initContainers": [{"name": "init", **same}],
        "containers": [{"name": "wait", **same}],
    }
    assert pod["runAsUser"] == 1000650000 and "fsGroup" not in pod


def test_only_the_step_that_asks_kubernetes_for_machines_is_given_its_accounts_token() -> None:
    """That a step sees none is looked at on a cluster: `tests/cluster/test_ablation_on_argo.py`."""
    steps = [t for t in templates(made("retraining")).values() if "container" in t]
    assert steps
    for step in steps:
        (mount,) = (each for each in step["container"]["volumeMounts"] if each["mountPath"] == ACCOUNT)
        assert mount["readOnly"] and {"name": mount["name"], "emptyDir": {}} in step["volumes"]
    values = read_values(GOLDEN / "values-full.yaml")
    waiting = pod_of("train", "hybrid", [], values, nodes=2)["container"]
    assert ACCOUNT not in {mount["mountPath"] for mount in waiting["volumeMounts"]}


def test_artifacts_have_keys_of_folders_which_alone_argo_deletes(tmp_path: Path) -> None:
    def keys(values: str) -> list[str]:
        made = one_step(values, "quantize-load", tmp_path)["outputs"]["artifacts"]
        assert all(artifact["archive"] == {"none": {}} for artifact in made)
        return sorted(artifact["s3"]["key"] for artifact in made)

    of_pod = "{{workflow.name}}/{{pod.name}}"
    assert keys("{}") == [f"{of_pod}/four_bit/", f"{of_pod}/outline/"]
    given = f"argo: {{repository: {{key_format: 'tuning/{of_pod}/'}}}}"
    assert keys(given) == [f"tuning/{of_pod}/four_bit/", f"tuning/{of_pod}/outline/"]
    for shared in ("artifacts", "{{workflow.name}}", "/", ""):
        with pytest.raises(InputError, match=r"argo\.repository\.key_format.*\{\{pod\.name\}\}"):
            keys(f"argo: {{repository: {{key_format: '{shared}'}}}}")


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ("OOMKilled (exit code 137)", False),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 20Mi. ", False),
        ('Container main exceeded its local ephemeral storage limit "20Mi". ', False),
        ('Usage of EmptyDir volume "outputs" exceeds the limit "1Gi". ', False),
        ("The node was low on resource: ephemeral-storage. Threshold quantity: 1, available: 0. ", True),
        ("The node had condition: [DiskPressure]. ", True),
        ("pod deleted", True),
    ],
)
def test_kubernetes_words_for_a_limit_that_a_step_passed_end_it_and_a_nodes_troubles_do_not(
    message: str, again: bool
) -> None:
    (pattern,) = re.findall(r"lastRetry\.message matches '(.+)'", FINAL)
    assert (re.search(pattern, message) is None) is again


def test_a_step_is_tried_again_but_not_where_it_would_fail_again(tmp_path: Path) -> None:
    strategy = one_step("defaults: {retries: {attempts: 4, backoff: 2m}}", "compare", tmp_path)[
        "retryStrategy"
    ]
    assert strategy == {
        "limit": "4", "retryPolicy": "Always", "expression": FINAL,
        "backoff": {"duration": "120", "factor": "2", "cap": "10m"},
    }  # fmt: skip
    windowed = one_step("defaults: {retries: {max_backoff: 1d}}", "compare", tmp_path)["retryStrategy"]
    assert windowed["backoff"]["maxDuration"] == "86400"
    assert "retryStrategy" not in one_step("defaults: {retries: {attempts: 0}}", "compare", tmp_path)


def test_what_argo_has_no_use_for_is_told() -> None:
    told = not_argos(read_values(GOLDEN / "values-full.yaml"))
    assert [line.partition(":")[0] for line in told[:2]] == ["run.pipeline_root", "run.experiment"]
    assert "steps.train.retries.factor: 1.5: Argo Workflows takes whole numbers; it is 2" in told
    assert not_argos(ClusterValues()) == []


def test_a_text_of_two_braces_is_no_reference_to_argo() -> None:
    given = {"data": {"prompt_template": "{{prompt}} {{{x}}}"}, "rank": 16.0, "rate": 0.5, "pack": False}
    written = text(given)
    assert "{{" not in written
    assert json.loads(written) == given and '"rank": 16,' in written
    assert (text("plain"), text(3.0), text(True)) == ("plain", "3", "true")


def test_the_yaml_is_the_document_written_out(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(manifest([made("ablation")]))
    assert yaml.safe_load(path.read_text()) == made("ablation") == read_template(path)
    assert "&id" not in path.read_text()
    for wrong in ("", "kind: Workflow", "a: [", "apiVersion: argoproj.io/v1alpha1\nkind: WorkflowTemplate"):
        path.write_text(wrong)
        with pytest.raises(InputError, match=r"--package: .*: expected a WorkflowTemplate written by"):
            read_template(path)
