"""Records what Kubernetes says of pods that cannot go on, and of questions that it refuses: `tests/kubernetes_server.py` serves it.

    python -m tests.cluster.record [--image busybox:1]

The cluster is that of KUBECONFIG, the pods are in a namespace of their own that goes at the end, and the image needs a shell,
sleep and dd. It takes 20 s to 2 minutes: the kubelet looks once a minute at what a pod has written.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client import ApiException

from tests.cluster.services import eventually

RECORDING = Path(__file__).resolve().parents[1] / "unit" / "recorded" / "kubernetes.json"
NAMESPACE = "spectraqlora-recorded"
LABEL = "recorded"
REFUSED = "step 7 of 40\nerror: train.batch_size: '9': expected less\nlauncher: exit 1"
RAISED = "Traceback (most recent call last):\nKeyError: 'x'"


def says(text: str, code: int) -> list[str]:
    """A command that prints a text and ends with a code."""
    return ["sh", "-c", f"cat <<'END'\n{text}\nEND\nexit {code}"]


SLEEPS = ["sleep", "3600"]
WRITES = ["sh", "-c", "dd if=/dev/zero of=/tmp/much bs=1M count=20; sleep 3600"]
PODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "running": ({"command": ["sh", "-c", "echo one; echo two; sleep 3600"]}, {}),
    "done": ({"command": says("done", 0)}, {}),
    "refused": ({"command": says(REFUSED, 2)}, {}),
    "raised": ({"command": says(RAISED, 1)}, {}),
    "out of memory": (
        {"command": ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M"], "resources": {"limits": {"memory": "16Mi"}}},
        {},
    ),
    "too long": ({"command": SLEEPS}, {"activeDeadlineSeconds": 2}),
    "too much written": ({"command": WRITES, "resources": {"limits": {"ephemeral-storage": "1Mi"}}}, {}),
    "no image": ({"image": "registry.invalid/none-such:1", "imagePullPolicy": "Always"}, {}),
    "no image by name": ({"command": SLEEPS}, {"initContainers": [{"name": "kfp-launcher", "image": "No/such:1"}]}),
    "no secret": (
        {"command": SLEEPS, "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "none-such", "key": "x"}}}]},
        {},
    ),
    "no node": ({"command": SLEEPS, "resources": {"limits": {"nvidia.com/gpu": "64"}}}, {}),
}  # fmt: skip
"""Of a pod: its container, and more of its spec."""
ENDED = {"done", "refused", "raised", "out of memory", "too long", "too much written"}


def settled(name: str, pod: dict[str, Any]) -> bool:
    """Whether a pod has come to what it is recorded for."""
    status = pod["status"]
    containers = [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
    waiting = [each["state"].get("waiting", {}).get("reason") for each in containers]
    if name in ENDED:
        return status["phase"] in ("Succeeded", "Failed")
    if name == "running":
        return bool(status["phase"] == "Running")
    if name == "no node":
        return any(each.get("reason") == "Unschedulable" for each in status.get("conditions", []))
    return any(reason not in (None, "ContainerCreating", "PodInitializing") for reason in waiting)


def plain(document: Any) -> Any:
    """As the API sent it, without what says who wrote which field."""
    document["metadata"].pop("managedFields", None)
    return document


def answer(call: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Status, type and body of a raw answer."""
    try:
        raw = call(*arguments, **options)
        status, headers, body = raw.status, raw.headers, raw.data
    except ApiException as error:
        status, headers, body = error.status, error.headers, error.body
    text = body.decode() if isinstance(body, bytes) else body
    return {"status": status, "type": headers["Content-Type"], "body": text}


def record(namespace: str, image: str) -> dict[str, Any]:
    """Make the pods, and wait for what becomes of them."""
    core = client.CoreV1Api()

    def create(name: str, container: dict[str, Any], spec: dict[str, Any]) -> Any:
        own = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", **container}
        label = name.replace(" ", "-")
        more = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
        }
        return core.create_namespaced_pod(
            namespace,
            {
                "metadata": {"name": f"recorded-{label}", "labels": {LABEL: label}},
                "spec": {**more, "containers": [own], **spec},
            },
            _preload_content=False,
        )

    def listed() -> dict[str, Any]:
        raw = core.list_namespaced_pod(namespace, label_selector=LABEL, _preload_content=False)
        return dict(json.loads(raw.data))

    for name, (container, spec) in PODS.items():
        create(name, container, spec)
    by_label = {name.replace(" ", "-"): name for name in PODS}

    def found() -> dict[str, dict[str, Any]]:
        return {by_label[pod["metadata"]["labels"][LABEL]]: pod for pod in listed()["items"]}

    eventually(lambda: all(settled(name, pod) for name, pod in found().items()), 240, every=1)
    time.sleep(2)
    pods, whole = found(), listed()

    raw = {"_preload_content": False}

    def log(name: str, **options: Any) -> dict[str, Any]:
        pod = f"recorded-{name.replace(' ', '-')}"
        return answer(core.read_namespaced_pod_log, pod, namespace, container="main", **options, **raw)

    nobody = client.CoreV1Api(client.ApiClient(header_name="Impersonate-User", header_value="nobody"))
    objects = client.CustomObjectsApi()
    workflows = ("argoproj.io", "v1alpha1", namespace, "workflows")
    none = objects.list_namespaced_custom_object(*workflows, label_selector=f"{LABEL}=none")
    recorded = {
        "pods": {name: plain(pods[name]) for name in PODS},
        "pod list": {**whole, "items": []},
        "workflow list": {**none, "items": []},
        "logs": {name: log(name) for name in ("running", "refused", "raised")},
        "log, its last line": log("running", tail_lines=1),
        "log of a container that waits": log("no image"),
        "log of a pod that is gone": log("gone"),
        "forbidden": answer(nobody.list_namespaced_pod, namespace, **raw),
    }
    quota = {"metadata": {"name": "compute"}, "spec": {"hard": {"limits.cpu": "4"}}}
    core.create_namespaced_resource_quota(namespace, quota)

    def over_quota() -> dict[str, Any] | None:
        """Kubernetes refuses it once it has counted what is there; until then it takes it, or knows too little."""
        refused = answer(create, "over quota", {"resources": {"limits": {"cpu": "8"}}}, {})
        return refused if "exceeded quota" in refused["body"] else None

    recorded["over quota"] = eventually(over_quota, 60)
    return recorded


def main() -> None:
    """Write the recording."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", default="busybox:1")
    given = parser.parse_args()
    config.load_kube_config()
    version, core = client.VersionApi().get_code().git_version, client.CoreV1Api()
    core.create_namespace({"metadata": {"name": NAMESPACE}})
    try:
        recorded = {"kubernetes": version, **record(NAMESPACE, given.image)}
    finally:
        core.delete_namespace(NAMESPACE)
    RECORDING.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORDING.name}: {len(recorded['pods'])} pods of Kubernetes {version}")


if __name__ == "__main__":
    main()
