"""The chart under a real helm 3.10 and helm 4: lint, render, refuse, validate, meet pod security."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kubernetes.utils.quantity import parse_quantity
from mlflow import MlflowClient
from spectraqlora.errors import InputError
from spectraqlora.tracking.runs import KFP_UI, MLFLOW_UI
from spectraqlora_pipelines.cluster.environment import CACHED
from spectraqlora_pipelines.reference import CHART

from tests.helm import ROOT, helm
from tests.s3 import free_port

pytestmark = pytest.mark.e2e

CASES = {
    "default": None,
    **{name: CHART / f"ci/{name}-values.yaml" for name in ("minimal", "full", "argo")},
}
REQUIRED = {
    "pipeline": {"settings": {"model": {"base_model": "owner/model"}, "data": {"source": "owner/data"}}},
    "mlflow": {"uri": "http://mlflow"},
}
"""What has no default: nobody else knows the model, the data and the MLflow of a team."""
GIVEN = [
    "pipeline.settings.model.base_model=owner/model",
    "pipeline.settings.data.source=owner/data",
    "mlflow.uri=http://mlflow",
]
SERVER = [
    "mlflow.server.enabled=true",
    "mlflow.server.database.secret=db",
    "mlflow.server.artifacts=s3://bucket/mlflow",
]
MODES = ["", "schedule.mode=cronjob", "hook.enabled=false"]
# Without Kubeflow Pipelines there is no schedule of the chart's.
RENDERED = [(case, mode) for case in CASES for mode in MODES if case != "argo" or mode != MODES[1]]
TRUST = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
OLDEST_KUBERNETES = "1.25"
Object = dict[str, Any]


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False, timeout=120)


def rendered_text(case: str, mode: str = "") -> str:
    values = CASES[case]
    options = ["--values", str(values)] if values else []
    assignments = [*(GIVEN if case == "default" else ()), *([mode] if mode else ())]
    options += [part for assignment in assignments for part in ("--set", assignment)]
    done = run_helm("template", "release", str(CHART), "--namespace", "team", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(case: str, mode: str = "") -> list[Object]:
    return [part for part in yaml.safe_load_all(rendered_text(case, mode)) if part]


def values_of(case: str) -> dict[str, Any]:
    path = CASES[case]
    return yaml.safe_load(path.read_text()) if path else copy.deepcopy(REQUIRED)


def find(objects: list[Object], kind: str, ending: str = "") -> Object:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(ending))


def pod_specs(objects: list[Object]) -> dict[str, Object]:
    found = {}
    for item in objects:
        spec = item.get("spec") or {}
        if item["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        pod = spec if item["kind"] == "Pod" else (spec.get("template") or {}).get("spec")
        if pod:
            found[f"{item['kind']}/{item['metadata']['name']}"] = pod
    return found


@pytest.mark.parametrize("case", CASES)
def test_helm_lints_it_strictly(case: str) -> None:
    values = CASES[case]
    done = run_helm("lint", "--strict", str(CHART), *(["--values", str(values)] if values else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 chart(s) failed" in done.stdout


@pytest.mark.parametrize(("case", "mode"), RENDERED)
def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes(case: str, mode: str) -> None:
    import kubernetes_validate

    newest = kubernetes_validate.latest_version()
    objects = rendered(case, mode)
    assert len(objects) >= 5
    for version in (OLDEST_KUBERNETES, newest):
        for item in objects:
            # Raises where a field is unknown or of the wrong type, and where there is no schema for the kind.
            used = kubernetes_validate.validate(item, version, strict=True)
            assert newest.startswith(used) or used == OLDEST_KUBERNETES
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)


def test_an_object_without_a_schema_or_with_an_unknown_field_fails_the_validation() -> None:
    import kubernetes_validate

    config = find(rendered("minimal"), "ConfigMap")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**config, "dta": {}}, OLDEST_KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        kubernetes_validate.validate({**config, "kind": "ConfigMop"}, OLDEST_KUBERNETES, strict=True)


def test_the_oldest_kubernetes_is_the_one_that_the_chart_names() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST_KUBERNETES}.0-0"
    assert run_helm("template", "r", str(CHART), "--kube-version", "1.24.0").returncode != 0


@pytest.mark.parametrize(("case", "mode"), RENDERED)
def test_helm_4_lints_and_renders_the_same(case: str, mode: str) -> None:
    import helm_python

    assert helm_python.helm_sdk_version().startswith("v4.")
    values = values_of(case)
    if mode:
        values = helm_python.values_from_yaml(yaml.safe_dump(values))
        section, _, rest = mode.partition(".")
        key, _, value = rest.partition("=")
        values.setdefault(section, {})[key] = yaml.safe_load(value)
    report = helm_python.lint(str(CHART), values, strict=True)
    assert not report["errors"] and not [m for m in report["messages"] if m["severity"] >= 2], report
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="release", namespace="team")
    found = [
        part
        for name, text in files.items()
        if not name.endswith(".txt")
        for part in yaml.safe_load_all(text)
        if part
    ]

    def ordered(objects: list[Object]) -> list[Object]:
        return sorted(objects, key=lambda o: (o["kind"], o["metadata"]["name"]))

    assert ordered(found) == ordered(rendered(case, mode))


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (["schedule.cron=never"], "schedule"),
        (["schedule.mode=sometimes"], "schedule.mode"),
        (["kfp.host=ml-pipeline"], "kfp.host"),
        (["kfp.host=https://me:secret@kfp"], "kfp.host"),
        (["kfp.host=", "schedule.mode=kfp"], "schedule.mode: none without kfp.host"),
        (["kfp.host=", "schedule.mode=cronjob"], "schedule.mode: none without kfp.host"),
        (["image.digest=sha256:12"], "image.digest"),
        (["image.pullPolicy=Maybe"], "image.pullPolicy"),
        (["nonsense=1"], "nonsense"),
        (["mlflow.server.prt=5000"], "prt"),
        (["mlflow.server.port=80"], "mlflow.server.port"),
        (["mlflow.uri=mlflow"], "mlflow.uri"),
        (["cache.size=lots"], "cache.size"),
        (["pipeline.name=training"], "pipeline.name"),
        (["pipeline.values.stps.train.shm=1Gi"], "stps"),
        (["hook.retries=-1"], "hook.retries"),
        (["networkPolicy.egress.s3.cidrs={everywhere}"], "networkPolicy.egress.s3.cidrs"),
        (["secrets.s3.name=Not A Name"], "secrets.s3.name"),
        (["secrets.s3.value=hunter2"], "value"),
        (["commonLabels.app\\.kubernetes\\.io/name=x"], "commonLabels"),
        (["jobs.resources.limits.memory=plenty"], "jobs.resources.limits.memory"),
        (["mlflow.server.enabled=true"], "mlflow.server.database.secret"),
        (["mlflow.server.enabled=true", "mlflow.server.database.secret=d"], "mlflow.server.artifacts"),
        (["mlflow.server.env[0].value=1"], "mlflow.server.env"),
        (["mlflow.server.volumeMounts[0].name=a"], "mountPath"),
        (["mlflow.server.tmpSize=lots"], "mlflow.server.tmpSize"),
        (["mlflow.server.fsGroup=staff"], "mlflow.server.fsGroup"),
        (["jobs.affinity.nodes.a=b"], "nodes"),
        (["networkPolicy.dns.ports={dns}"], "networkPolicy.dns.ports"),
        (["pipeline.values.defaults.config_maps[0].name=A"], "pipeline.values.defaults.config_maps.0.name"),
        (["pipeline.values.defaults.affinity[0].weight=1"], "rules"),
        (["mlflow.uri="], "mlflow.uri: an MLflow address"),
        (["schedule.cron=0 24 * * *"], "schedule.cron"),
        (["schedule.cron=0 3 * * 8"], "schedule.cron"),
        (["pipeline.settings.model.base_model=sample"], "pipeline.settings.model.base_model"),
        (["pipeline.settings.data.source=rows.jsonl"], "pipeline.settings.data.source"),
        (["pipeline.settings.data.source=./rows"], "pipeline.settings.data.source"),
        (["pipeline.settings.select.percent=200"], "pipeline.settings.select.percent"),
        (["pipeline.settings.train.max_step=5"], "max_step"),
        (["pipeline.settings.train.optimizer=sgd"], "pipeline.settings.train.optimizer"),
        (["pipeline.settings.trian.max_steps=5"], "trian"),
        (["pipeline.values.steps.trian.shm=1Gi"], "pipeline.values.steps"),
        (["pipeline.values.defaults.memory.limit=lots"], "pipeline.values.defaults.memory.limit"),
        (["pipeline.values.steps.train.gpu.count=-1"], "pipeline.values.steps.train.gpu.count"),
        (["pipeline.values.defaults.retries.backoff=soon"], "pipeline.values.defaults.retries.backoff"),
        (["cache.enabled=true", "cache.existingClaim=x"], "either a new claim or an existing one"),
        (
            ["kfp.tokenSecret.name=x", "kfp.projectedToken.enabled=true", "kfp.namespace=t"],
            "one way to sign in",
        ),
        (["kfp.projectedToken.enabled=true"], "kfp.namespace: the profile's namespace"),
        (["quota.enabled=true"], "at least one resource"),
        (["mlflow.server.ingress.enabled=true"], "mlflow.server.ingress.enabled: false"),
        (
            ["mlflow.server.enabled=true", *SERVER[1:], "mlflow.server.ingress.enabled=true"],
            "mlflow.server.ingress.host: the name",
        ),
        (
            ["mlflow.server.enabled=true", *SERVER[1:], "mlflow.server.auth.enabled=true"],
            "secrets.mlflow.name: an existing Secret",
        ),
        (["mlflow.server.auth.enabled=perhaps"], "mlflow.server.auth.enabled"),
        (["mlflow.server.ingress.host=Not A Host"], "mlflow.server.ingress.host"),
        (["secrets.s3.allSteps=some"], "secrets.s3.allSteps"),
        (["pipeline.values.digests.trian=sha256:1"], "pipeline.values.digests"),
        (["pipeline.values.digests.train=sha256:1"], "pipeline.values.digests.train"),
    ],
)
def test_nonsense_is_refused_with_the_value_and_a_reason(assignments: list[str], reason: str) -> None:
    if "mlflow.server.enabled=true" in assignments:
        assignments = ["mlflow.uri=", *assignments]
    options = [part for assignment in [*GIVEN, *assignments] for part in ("--set", assignment)]
    done = run_helm("template", "release", str(CHART), *options)
    assert done.returncode != 0 and not done.stdout.strip()
    assert reason in done.stderr, done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("missing", GIVEN)
def test_what_only_the_team_knows_is_asked_for_by_its_name_before_anything_is_installed(missing: str) -> None:
    options = [part for assignment in GIVEN if assignment != missing for part in ("--set", assignment)]
    done = run_helm("template", "release", str(CHART), *options)
    assert done.returncode != 0 and f"{missing.partition('=')[0]}: " in done.stderr, done.stderr
    without_jobs = run_helm("template", "release", str(CHART), *options, "--set", "hook.enabled=false")
    assert without_jobs.returncode == 0, "no job needs it"


@pytest.mark.parametrize(
    "assignment",
    [
        "pipeline.settings.methods=qlora\\,hybrid",
        "pipeline.settings.methods={qlora,hybrid}",
        "pipeline.settings.train.gradient_checkpointing=on",
        "pipeline.settings.train.gradient_checkpointing=true",
        "pipeline.settings.train.learning_rate=2",
        "pipeline.settings.promote.guards.accuracy=0.05",
        "pipeline.values.defaults.cpu.limit=2",
        "pipeline.values.defaults.cpu.limit=500m",
        "pipeline.values.defaults.labels.team=7",
        "schedule.cron=*/15 0-6\\,20 ? JAN-MAR mon",
        "schedule.cron=@daily",
    ],
)
def test_what_settings_and_values_file_take_the_chart_takes(assignment: str) -> None:
    options = [part for each in [*GIVEN, assignment] for part in ("--set", each)]
    done = run_helm("template", "release", str(CHART), *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("case", "mode"), RENDERED)
def test_every_pod_meets_the_restricted_pod_security_level(case: str, mode: str) -> None:
    pods = pod_specs(rendered(case, mode))
    assert any(name.startswith("Pod/") for name in pods)
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["automountServiceAccountToken"] is False, name
        for volume in pod["volumes"]:
            allowed = {"emptyDir", "configMap", "projected", "secret", "persistentVolumeClaim"}
            assert volume.keys() - {"name"} <= allowed, name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert container["resources"]["limits"]["memory"], name
            assert "tmp" in {mount["name"] for mount in container["volumeMounts"]}, name


@pytest.mark.parametrize("case", ["minimal", "full"])
def test_secrets_stand_in_the_release_by_name_alone(case: str) -> None:
    text = rendered_text(case)
    assert not [o for o in rendered(case) if o["kind"] == "Secret"]
    assert "s3-credentials" in text


@pytest.mark.parametrize("case", CASES)
def test_the_config_map_holds_settings_and_a_values_file_that_we_accept(case: str, tmp_path: Path) -> None:
    from spectraqlora.settings import parse
    from spectraqlora_pipelines.cluster.values import read_values

    data = find(
        [o for o in rendered(case) if o["kind"] == "ConfigMap" and "settings.yaml" in o["data"]], "ConfigMap"
    )["data"]
    settings = parse(yaml.safe_load(data["settings.yaml"]) or {})
    (tmp_path / "values.yaml").write_text(data["cluster-values.yaml"])
    values = read_values(tmp_path / "values.yaml")
    account = {o["metadata"]["name"] for o in rendered(case) if o["kind"] == "ServiceAccount"}
    assert values.run.service_account in account
    assert ("experiment" in values.run.model_fields_set) == (case != "argo"), "only KFP has experiments"
    train = values.step("train")
    assert train.labels["app.kubernetes.io/part-of"] in {"tuning", "release-spectraqlora"}
    if case == "full":
        assert settings.tracking.uri == "https://tuning-mlflow.team.svc:5000"
        assert settings.select.percent == 25
        assert (train.image.tag, train.image.registry) == ("0.1.0-cuda", "registry.example.com/ml")
        assert [s.name for s in train.secrets] == ["s3-credentials", "mlflow-login", "artifactory-netrc"]
        assert [s.name for s in values.step("merge-export").secrets] == [
            "s3-credentials",
            "hub-token",
            "artifactory-netrc",
        ]
        pinned = {step: values.step(step).image.digest[-8:] for step in ("compare", "promote", "snr-analyze")}
        assert pinned == {"compare": "89abcdef", "promote": "ccddeeff", "snr-analyze": ""}
        assert not train.image.digest, "its own tag"
        assert train.cache.claim == "tuning-cache" and train.gpu.count == 1
        assert train.secrets[-1].mount == "/etc/netrc", "added to the chart's own"
        environment = find(rendered(case), "ConfigMap", "-environment")
        assert [c.name for c in train.config_maps] == [environment["metadata"]["name"], "company-ca"]
        assert set(train.config_maps[0].env.values()) == environment["data"].keys()
        folder = train.config_maps[1].mount
        assert train.env == {
            **dict.fromkeys(TRUST, f"{folder}/ca.crt"),
            MLFLOW_UI: "https://mlflow.example.com",
        }
        assert values.run.ui == "https://kubeflow.example.com/pipeline"
        assert train.affinity[0].rules[0].values == ("eu-central-1a",) and train.scratch.size == "200Gi"


def test_one_bundle_of_certificates_is_trusted_by_jobs_mlflow_and_steps() -> None:
    pods = pod_specs(rendered("full"))
    assert len(pods) >= 5
    for name, pod in pods.items():
        assert {"name": "trust", "configMap": {"name": "company-ca"}} in pod["volumes"], name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "trust"]
            given = {e["name"]: e.get("value") for e in container["env"]}
            assert {given[variable] for variable in TRUST} == {f"{mount['mountPath']}/ca.crt"}, name
    assert not [
        v for pod in pod_specs(rendered("minimal")).values() for v in pod["volumes"] if v["name"] == "trust"
    ]


def test_mlflow_has_its_account_environment_volumes_and_place() -> None:
    objects = rendered("full")
    given = values_of("full")["mlflow"]["server"]
    template = find(objects, "Deployment")["spec"]["template"]
    pod = template["spec"]
    account = find(objects, "ServiceAccount", pod["serviceAccountName"])
    assert account["metadata"]["annotations"] == given["serviceAccount"]["annotations"]
    assert account["metadata"]["name"] == "tuning-mlflow"
    assert given["podLabels"].items() <= template["metadata"]["labels"].items()
    assert template["metadata"]["annotations"] == given["podAnnotations"]
    assert pod["securityContext"]["fsGroup"] == given["fsGroup"]
    for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName"):
        assert pod[key] == given[key]
    assert given["volumes"][0] in pod["volumes"]
    for container in (*pod["containers"], *pod["initContainers"]):
        assert given["volumeMounts"][0] in container["volumeMounts"]
        assert all(entry in container["env"] for entry in given["env"])
        named = [entry["name"] for entry in container["env"]]
        assert len(set(named)) == len(named)
    minimal = run_helm(
        "template", "r", str(CHART), *[p for each in GIVEN[:2] for p in ("--set", each)],
        *[p for each in SERVER for p in ("--set", each)],
    )  # fmt: skip
    deployment = find([o for o in yaml.safe_load_all(minimal.stdout) if o], "Deployment")
    assert "fsGroup" not in deployment["spec"]["template"]["spec"]["securityContext"], minimal.stderr


def test_jobs_stay_out_of_the_mesh_and_go_where_they_are_told() -> None:
    for case in ("minimal", "full"):
        objects = rendered(case)
        for item in [o for o in objects if o["kind"] in ("Job", "Pod")]:
            metadata = item["spec"]["template"]["metadata"] if item["kind"] == "Job" else item["metadata"]
            for place in ("labels", "annotations"):
                assert metadata[place]["sidecar.istio.io/inject"] == "false", item["metadata"]["name"]
    given = values_of("full")["jobs"]
    pod = find(objects, "Job", "-publish")["spec"]["template"]["spec"]
    for key in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName"):
        assert pod[key] == given[key]
    assert given["volumes"][0] in pod["volumes"]
    assert given["volumeMounts"][0] in pod["containers"][0]["volumeMounts"]
    assert given["env"][0] in pod["containers"][0]["env"]


def test_policies_let_dns_and_the_clouds_credentials_through() -> None:
    def open_to(case: str, ending: str) -> tuple[set[Any], set[Any]]:
        (rule,) = find(rendered(case), "NetworkPolicy", ending)["spec"]["egress"]
        ports = {(part["protocol"], part["port"]) for part in rule["ports"]}
        return ports, {to["ipBlock"]["cidr"] for to in rule["to"] if "ipBlock" in to}

    for case in CASES:
        dns, _ = open_to(case, "-dns")
        assert dns == {(kind, port) for kind in ("UDP", "TCP") for port in (53, 5353)}
        ports, cidrs = open_to(case, "-metadata")
        assert ports == {("TCP", 80)} and "169.254.170.23/32" in cidrs
        assert ("169.254.169.254/32" in cidrs) == (case == "full"), "a node's role is nobody's by default"


def test_a_job_makes_the_cache_claim_writable_to_the_group_that_the_steps_have() -> None:
    assert not [o for o in rendered("minimal") if o["metadata"]["name"].endswith("-cache")]
    job = find(rendered("full"), "Job", "-cache")
    pod = job["spec"]["template"]["spec"]
    dockerfile = (ROOT / "images" / "base" / "Dockerfile").read_text()
    assert f"USER 10001:{pod['securityContext']['fsGroup']}\n" in dockerfile
    assert int(job["metadata"]["annotations"]["helm.sh/hook-weight"]) < 0, "before a run can start"
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "tuning-cache"}} in pod["volumes"]
    (container,) = pod["containers"]
    data = find(rendered("full"), "ConfigMap", "tuning")["data"]
    path = yaml.safe_load(data["cluster-values.yaml"])["defaults"]["cache"]["path"]
    assert [*container["command"], *container["args"]] == [
        *("mkdir", "-p", "-m", "2775"),
        *(f"{path}/{folder}" for folder in CACHED.values()),
    ]


def _wait_for(server: subprocess.Popen[bytes], address: str, folder: Path, verify: str | bool = True) -> None:
    """Until `_server`'s process answers; fails with its log where it ends, or is silent for two minutes."""
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{address}/health", timeout=2, verify=verify).ok:
                return
        assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
        time.sleep(0.2)


def _server(
    folder: Path, container: Object, uri: str, port: int, secrets: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """The MLflow container as a process of this machine, on this database and a folder.

    Args:
        folder: takes the place of /tmp, of the artifacts' address and of the certificates' folder.
        container: as rendered.
        uri: of the database.
        port: to listen on.
        secrets: values of Secrets by their keys; that of the database is its address.
    """
    held = {"uri": uri, **(secrets or {})}
    given = {
        entry["name"]: entry["value"].replace("/tmp/", f"{folder}/")
        if "value" in entry
        else held[entry["valueFrom"]["secretKeyRef"]["key"]]
        for entry in container["env"]
    }
    arguments = [
        a.replace("$(MLFLOW_BACKEND_STORE_URI)", uri)
        .replace("s3://bucket/mlflow", str(folder / "artifacts"))
        .replace("/etc/spectraqlora-tls", str(folder))
        .replace("--port=5000", f"--port={port}")
        .replace("--host=0.0.0.0", "--host=127.0.0.1")
        .replace("--allowed-hosts=", f"--allowed-hosts=127.0.0.1:{port},")
        for a in container.get("args", [])
    ]
    (folder / "tmp").mkdir(exist_ok=True)
    program = Path(sys.executable).with_name(container["command"][0])
    with open(folder / "server.log", "ab") as log:
        return subprocess.Popen(
            [str(program), *container["command"][1:], *arguments],
            env={**os.environ, **given, "HOME": str(folder / "tmp"), "TMPDIR": str(folder / "tmp")},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_the_mlflow_server_idles_within_its_request_and_takes_two_uploads_at_once_within_its_limit(
    tmp_path: Path,
) -> None:
    options = [part for each in [*GIVEN[:2], *SERVER] for part in ("--set", each)]
    done = run_helm("template", "r", str(CHART), *options)
    pod = find([o for o in yaml.safe_load_all(done.stdout) if o], "Deployment")["spec"]["template"]["spec"]
    uri, port = f"sqlite:///{tmp_path}/mlflow.db", free_port()
    upgrade = _server(tmp_path, pod["initContainers"][0], uri, port)
    assert upgrade.wait(timeout=120) == 0, (tmp_path / "server.log").read_text()
    (container,) = pod["containers"]
    amounts = {
        kind: int(parse_quantity(container["resources"][kind]["memory"])) for kind in ("requests", "limits")
    }
    server = _server(tmp_path, container, uri, port)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(server, address, tmp_path)
        client = MlflowClient(address)
        run = client.create_run(client.create_experiment("memory")).info

        def resident() -> int:
            """Of all processes of the server; what they share counts in each."""
            parts = [psutil.Process(server.pid)]
            parts += parts[0].children(recursive=True)
            return sum(part.memory_info().rss for part in parts if part.is_running())

        assert resident() < amounts["requests"], f"{resident() / 2**20:.0f} MiB idle"
        target = f"{address}/api/2.0/mlflow-artifacts/artifacts/{run.experiment_id}/{run.run_id}/artifacts"
        size, block = 400 * 2**20, bytes(2**20)
        peak = 0
        with ThreadPoolExecutor(2) as pool:
            sent = [
                pool.submit(requests.put, f"{target}/{name}", data=(block for _ in range(400)), timeout=300)
                for name in ("one", "two")
            ]
            while not all(future.done() for future in sent):
                peak = max(peak, resident())
                time.sleep(0.05)
        assert [future.result().status_code for future in sent] == [200, 200]
        assert sorted(p.stat().st_size for p in (tmp_path / "artifacts").rglob("*") if p.is_file()) == [
            size,
            size,
        ]
        assert peak < amounts["limits"], f"{peak / 2**20:.0f} MiB at most"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _certificate(folder: Path, host: str) -> Path:
    """A self-signed certificate with its key, as a Secret of type kubernetes.io/tls holds them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "tls.crt"


def test_with_an_ingress_mlflow_asks_who_somebody_is_and_speaks_tls_where_it_has_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectraqlora.settings import TrackingSettings
    from spectraqlora.tracking.runs import Tracker

    given = [
        *GIVEN[:2], *SERVER, "mlflow.server.ingress.enabled=true", "mlflow.server.ingress.host=mlflow.example.com",
        "secrets.mlflow.name=mlflow-login", "mlflow.server.tls.secret=mlflow-tls",
    ]  # fmt: skip
    done = run_helm("template", "r", str(CHART), *[part for each in given for part in ("--set", each)])
    objects = [part for part in yaml.safe_load_all(done.stdout) if part]
    pod = find(objects, "Deployment")["spec"]["template"]["spec"]
    secrets = {
        "username": "pipeline",
        "password": "a-long-password-for-this-test",
        "session_key": "random-text",
    }
    # With a percent sign, as the password in an address may have.
    uri, port = f"sqlite:///{tmp_path}/mlflow.db?timeout=30%2E0", free_port()
    bundle = _certificate(tmp_path, "127.0.0.1")
    for container in pod["initContainers"]:
        assert _server(tmp_path, container, uri, port, secrets).wait(timeout=120) == 0, (
            tmp_path / "server.log"
        ).read_text()
    assert (tmp_path / "auth.ini").stat().st_mode & 0o077 == 0
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    server = _server(tmp_path, container, uri, port, secrets)
    address = f"https://127.0.0.1:{port}"
    try:
        _wait_for(server, address, tmp_path, str(bundle))
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{address}/health", timeout=10)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}/health", timeout=10)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        search = f"{address}/api/2.0/mlflow/experiments/search?max_results=1"
        assert requests.get(search, timeout=10).status_code == 401
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", secrets["username"])
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        settings = TrackingSettings(uri=address)
        with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            Tracker(settings, "key", "train").pipeline_run()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secrets["password"])
        assert Tracker(settings, "key", "train").pipeline_run()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_mlflow_is_open_inside_the_cluster_alone_unless_told_and_its_addresses_follow() -> None:
    options = [part for each in [*GIVEN[:2], *SERVER] for part in ("--set", each)]

    def server(*more: str) -> tuple[list[Object], list[str], dict[str, Any]]:
        done = run_helm("template", "r", str(CHART), *options, *[p for m in more for p in ("--set", m)])
        assert done.returncode == 0, done.stderr
        objects = [part for part in yaml.safe_load_all(done.stdout) if part]
        (container,) = find(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
        data = find([o for o in objects if "settings.yaml" in o.get("data", {})], "ConfigMap")["data"]
        return objects, container["args"], yaml.safe_load(data["settings.yaml"])

    objects, arguments, settings = server()
    assert not [o for o in objects if o["kind"] == "Ingress"] and "--app-name=basic-auth" not in arguments
    assert settings["tracking"]["uri"] == "http://r-spectraqlora-mlflow.default.svc:5000"
    _, arguments, _ = server("mlflow.server.auth.enabled=true", "secrets.mlflow.name=login")
    assert "--app-name=basic-auth" in arguments
    way = ["mlflow.server.ingress.enabled=true", "mlflow.server.ingress.host=m.example.com"]
    objects, arguments, _ = server(*way, "mlflow.server.auth.enabled=false")
    assert "--app-name=basic-auth" not in arguments, "told so"
    allowed = next(a for a in arguments if a.startswith("--allowed-hosts="))
    assert "m.example.com" in allowed.partition("=")[2].split(",")
    (rule,) = find(objects, "Ingress")["spec"]["rules"]
    assert rule["host"] == "m.example.com"
    _, _, settings = server("mlflow.server.tls.secret=cert")
    assert settings["tracking"]["uri"].startswith("https://")


def test_a_steps_account_may_patch_workflowtaskresults_alone() -> None:
    role = find(rendered("full"), "Role", "tuning")
    may = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    changing = {entry for entry in may if entry[2] not in ("get", "list", "watch")}
    assert changing == {
        ("argoproj.io", "workflowtaskresults", "create"),
        ("argoproj.io", "workflowtaskresults", "patch"),
        ("argoproj.io", "workflowartifactgctasks/status", "patch"),
    }
    assert {(resource, verb) for group, resource, verb in may if not group} == {
        ("pods", "get"),
        ("configmaps", "get"),
        ("secrets", "get"),
    }
    for rule in role["rules"]:
        if {"secrets", "configmaps"} & set(rule["resources"]):
            assert rule["resourceNames"], "by name alone"


def test_policies_deny_by_default_and_select_our_pods_and_the_steps(tmp_path: Path) -> None:
    objects = rendered("full")
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    deny = policies["tuning-deny"]
    assert (
        set(deny["policyTypes"]) == {"Ingress", "Egress"} and "ingress" not in deny and "egress" not in deny
    )
    selected = deny["podSelector"]["matchLabels"]
    for item in objects:
        template = item.get("spec", {}).get("template") or item.get("spec", {}).get("jobTemplate", {}).get(
            "spec", {}
        ).get("template")
        if template:
            assert selected.items() <= template["metadata"]["labels"].items()
    assert {"tuning-dns", "tuning-s3", "tuning-mlflow", "tuning-kfp", "tuning-hub"} <= policies.keys()
    options = [
        part for each in [*GIVEN, "networkPolicy.egress.hub.enabled=false"] for part in ("--set", each)
    ]
    closed = run_helm("template", "r", str(CHART), *options).stdout
    assert "name: r-spectraqlora-hub" not in closed and "name: r-spectraqlora-s3" in closed


def test_the_hook_creates_the_recurring_run_and_removes_it_with_the_release() -> None:
    objects = rendered("full")
    publish, remove = find(objects, "Job", "-publish"), find(objects, "Job", "-unschedule")
    assert publish["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade,post-rollback"
    assert remove["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"
    arguments = publish["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:5] == ["schedule", "create", "nightly", "--cron", "30 2 * * *"]
    owned = ["--owner", "team/release"]
    assert arguments[arguments.index("--owner") :][:2] == owned
    assert remove["spec"]["template"]["spec"]["containers"][0]["args"] == ["schedule", "delete", *owned]
    cron = find(rendered("minimal", "schedule.mode=cronjob"), "CronJob")["spec"]
    assert cron["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][0] == "submit"
    assert cron["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize(("case", "mode"), RENDERED)
def test_a_job_tries_bad_input_once_and_says_how_it_ended(case: str, mode: str) -> None:
    objects = rendered(case, mode)
    jobs = [o["spec"] for o in objects if o["kind"] == "Job"]
    assert all(job["ttlSecondsAfterFinished"] >= 3600 for job in jobs), "a failed hook goes by itself"
    jobs += [o["spec"]["jobTemplate"]["spec"] for o in objects if o["kind"] == "CronJob"]
    assert jobs or mode == "hook.enabled=false" or case == "argo"
    assert not (jobs and case == "argo"), "they ask Kubeflow Pipelines"
    for job in jobs:
        first = job["podFailurePolicy"]["rules"][0]
        assert first["action"] == "FailJob" and first["onExitCodes"] == {"operator": "In", "values": [2]}
        assert job["template"]["spec"]["restartPolicy"] == "Never", "a policy for failures needs that"
    for pod in pod_specs(objects).values():
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_bad_input_ends_a_hook_with_the_code_that_is_not_tried_again(tmp_path: Path) -> None:
    container = find(rendered("minimal"), "Job", "-publish")["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "settings.yaml").write_text("train: {max_steps: none}")
    (tmp_path / "cluster-values.yaml").write_text("{}")
    done = _run(container, tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2 and "train.max_steps" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("case", CASES)
def test_helm_can_show_the_logs_of_each_test(case: str) -> None:
    tests = [o for o in rendered(case) if o["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    names = {o["metadata"]["name"].rpartition("spectraqlora")[2].removeprefix("tuning") for o in tests}
    assert names == {"-test-mlflow", *(() if case == "argo" else ("-test",))}
    for pod in tests:
        assert pod["kind"] == "Pod" and len(pod["spec"]["containers"]) == 1
        assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"


def _run(container: Object, folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """A job's container as a process of this machine, its ConfigMap in `folder`."""
    arguments = [a.replace("/etc/spectraqlora", str(folder)) for a in container["args"]]
    return subprocess.run(
        [sys.executable, *container["command"][1:], *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(folder), "SPECTRAQLORA_KFP_HOST": endpoint},
    )


def _hook(
    release: str, assignments: list[str], folder: Path, endpoint: str, ending: str = "-publish"
) -> None:
    """What helm runs after an install, an upgrade or a rollback, or with ending -unschedule before an uninstall."""
    options = [part for each in [*GIVEN, *assignments] for part in ("--set", each)]
    done = run_helm("template", release, str(CHART), "--namespace", "team", *options)
    assert done.returncode == 0, done.stderr
    objects = [part for part in yaml.safe_load_all(done.stdout) if part]
    data = find([o for o in objects if "settings.yaml" in o.get("data", {})], "ConfigMap")["data"]
    for name, text in data.items():
        (folder / name).write_text(text)
    pod = find(objects, "Job", ending)["spec"]["template"]["spec"]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        done = _run(container, folder, endpoint)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_releases_recurring_run_follows_its_name_and_mode_and_goes_with_it(tmp_path: Path) -> None:
    from tests.kfp_server import KfpServer

    def names() -> list[str]:
        return sorted(run["display_name"] for run in server.state.recurring.values())

    with KfpServer() as server:
        nightly = ["schedule.mode=kfp", "schedule.name=nightly"]
        _hook("other", ["schedule.mode=kfp", "schedule.name=theirs"], tmp_path, server.endpoint)
        _hook("tuning", nightly, tmp_path, server.endpoint)
        assert names() == ["nightly", "theirs"]
        _hook("tuning", ["schedule.mode=kfp", "schedule.name=weekly"], tmp_path, server.endpoint)
        assert names() == ["theirs", "weekly"], "another name"
        _hook("tuning", [], tmp_path, server.endpoint)
        assert names() == ["theirs"], "another mode"
        _hook("tuning", nightly, tmp_path, server.endpoint)
        assert names() == ["nightly", "theirs"], "rolled back"
        _hook("tuning", nightly, tmp_path, server.endpoint, "-unschedule")
        assert names() == ["theirs"], "uninstalled"
        assert server.problems == []


@pytest.mark.parametrize("case", ["full", "minimal"])
def test_the_hooks_own_command_publishes_to_kubeflow_pipelines(case: str, tmp_path: Path) -> None:
    from tests.kfp_server import KfpServer

    objects = rendered(case)
    data = find([o for o in objects if "settings.yaml" in o.get("data", {})], "ConfigMap")["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    container = find(objects, "Job", "-publish")["spec"]["template"]["spec"]["containers"][0]
    with KfpServer() as server:
        done = _run(container, tmp_path, server.endpoint)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.state.versions) == 1
        if case == "full":
            (recurring,) = server.state.recurring.values()
            assert recurring["display_name"] == "nightly" and recurring["service_account"] == "tuning"
        else:
            assert not server.state.runs and not server.state.recurring
        assert server.problems == []


def test_the_jobs_environment_has_names_that_the_command_line_reads() -> None:
    from spectraqlora_pipelines.cli.app import app
    from spectraqlora_pipelines.cli.kubeflow import COOKIE, TOKEN

    group = typer.main.get_command(app)
    commands = (group.commands["submit"], group.commands["schedule"].commands["create"])
    known = {TOKEN, COOKIE}
    for option in (option for command in commands for option in command.params):
        known |= {option.envvar} if isinstance(option.envvar, str) else set(option.envvar or ())
    container = find(rendered("full"), "Job", "-publish")["spec"]["template"]["spec"]["containers"][0]
    own = {e["name"] for e in values_of("full")["jobs"]["env"]}
    names = {e["name"] for e in container["env"]} - {"HOME", KFP_UI, *TRUST} - own
    assert len(names) >= 3
    assert names <= known, names - known


@pytest.mark.parametrize(
    "path", ["values.yaml", "Chart.yaml", "ci/minimal-values.yaml", "ci/full-values.yaml"]
)
def test_the_charts_own_yaml_is_clean(path: str) -> None:
    from yamllint import linter
    from yamllint.config import YamlLintConfig

    rules = "{extends: default, rules: {document-start: disable, line-length: {max: 110}, braces: {max-spaces-inside: 0}}}"
    assert not list(linter.run((CHART / path).read_text(), YamlLintConfig(rules)))


def test_the_notes_name_the_next_command() -> None:
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        for case, words in (
            ("default", "spectraqlora submit --host"),
            ("full", "spectraqlora schedule list"),
            ("argo", "spectraqlora submit --target argo --namespace team --pipeline ablation"),
        ):
            notes = chart.render(values_of(case), name="release", namespace="team")[
                "spectraqlora/templates/NOTES.txt"
            ]
            assert words in notes and "helm test release --namespace team" in notes


def test_helm_packages_it(tmp_path: Path) -> None:
    assert run_helm("package", str(CHART), "--destination", str(tmp_path)).returncode == 0
    assert (ROOT / "charts").is_dir() and next(tmp_path.glob("spectraqlora-*.tgz")).stat().st_size > 5000


def test_trainings_on_several_machines_get_a_runtime_that_their_values_file_names() -> None:
    import kubernetes_validate

    def own(mode: str) -> list[Object]:
        return [o for o in rendered("full", mode) if o["metadata"]["name"].endswith("-nodes")]

    assert not own("")
    kinds = {o["kind"]: o for o in own("nodes.enabled=true")}
    assert kinds.keys() == {"TrainingRuntime", "Role", "RoleBinding", "NetworkPolicy"}
    for kind in ("Role", "RoleBinding", "NetworkPolicy"):
        kubernetes_validate.validate(kinds[kind], OLDEST_KUBERNETES, strict=True)
    config = next(
        o for o in rendered("full", "nodes.enabled=true") if "cluster-values.yaml" in o.get("data", {})
    )
    named = yaml.safe_load(config["data"]["cluster-values.yaml"])["nodes"]["runtime"]
    assert named == kinds["TrainingRuntime"]["metadata"]["name"] == "tuning-nodes"


def test_the_machines_of_a_training_pull_their_image_as_its_step_would() -> None:
    def policy(*assignments: str) -> Any:
        options = [part for each in ("nodes.enabled=true", *assignments) for part in ("--set", each)]
        done = run_helm("template", "r", str(CHART), "--values", str(CASES["full"]), *options)
        (runtime,) = (o for o in yaml.safe_load_all(done.stdout) if o and o["kind"] == "TrainingRuntime")
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return container["imagePullPolicy"]

    every, of_train = (f"pipeline.values.{part}.image.pull_policy=" for part in ("defaults", "steps.train"))
    assert policy() == "Always"
    assert policy(every + "IfNotPresent") == "IfNotPresent"
    assert policy(every + "IfNotPresent", of_train + "Never") == "Never"
