"""The chart under a real helm 3.10 and helm 4: lint, render, refuse, validate, meet pod security."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from spectraqlora_pipelines.reference import CHART

from tests.helm import ROOT, helm

pytestmark = pytest.mark.e2e

CASES = {"default": None, "minimal": CHART / "ci/minimal-values.yaml", "full": CHART / "ci/full-values.yaml"}
MODES = ["", "schedule.mode=cronjob", "hook.enabled=false"]
OLDEST_KUBERNETES = "1.25"
Object = dict[str, Any]


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False, timeout=120)


def rendered_text(case: str, mode: str = "") -> str:
    values = CASES[case]
    options = ["--values", str(values)] if values else []
    options += ["--set", mode] if mode else []
    if "cronjob" in mode and case == "default":
        options += ["--set", "mlflow.uri=http://mlflow"]
    done = run_helm("template", "release", str(CHART), "--namespace", "team", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(case: str, mode: str = "") -> list[Object]:
    return [part for part in yaml.safe_load_all(rendered_text(case, mode)) if part]


def values_of(case: str) -> dict[str, Any]:
    path = CASES[case]
    return yaml.safe_load(path.read_text()) if path else {}


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_helm_4_lints_and_renders_the_same(case: str, mode: str) -> None:
    import helm_python

    assert helm_python.helm_sdk_version().startswith("v4.")
    values = values_of(case)
    if mode:
        values = helm_python.values_from_yaml(yaml.safe_dump(values))
        section, _, rest = mode.partition(".")
        key, _, value = rest.partition("=")
        values.setdefault(section, {})[key] = yaml.safe_load(value)
        if "cronjob" in mode and case == "default":
            values["mlflow"] = {"uri": "http://mlflow"}
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
        (["mlflow.server.enabled=true"], "an image with mlflow"),
        (["mlflow.server.enabled=true", "mlflow.server.image.repository=m"], "mlflow.server.database.secret"),
        (["schedule.mode=kfp"], "an MLflow address"),
        (["cache.enabled=true", "cache.existingClaim=x"], "either a new claim or an existing one"),
        (["kfp.tokenSecret.name=x", "kfp.projectedToken.enabled=true"], "one way to sign in"),
        (["quota.enabled=true"], "at least one resource"),
    ],
)
def test_nonsense_is_refused_with_the_value_and_a_reason(assignments: list[str], reason: str) -> None:
    options = [part for assignment in assignments for part in ("--set", assignment)]
    done = run_helm("template", "release", str(CHART), *options)
    assert done.returncode != 0 and not done.stdout.strip()
    assert reason in done.stderr, done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_pod_meets_the_restricted_pod_security_level(case: str, mode: str) -> None:
    pods = pod_specs(rendered(case, mode))
    assert any(name.startswith("Pod/") for name in pods)
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["automountServiceAccountToken"] is False, name
        for volume in pod["volumes"]:
            assert volume.keys() - {"name"} <= {"emptyDir", "configMap", "projected", "secret"}, name
        for container in pod["containers"]:
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
    train = values.step("train")
    assert train.labels["app.kubernetes.io/part-of"] in {"tuning", "release-spectraqlora"}
    if case == "full":
        assert settings.tracking.uri == "http://tuning-mlflow.team.svc:5000"
        assert settings.select.percent == 25
        assert (train.image.tag, train.image.registry) == ("0.1.0-cuda", "registry.example.com/ml")
        assert [s.name for s in train.secrets] == ["s3-credentials", "mlflow-login", "hub-token"]
        assert train.cache.claim == "tuning-cache" and train.gpu.count == 1
        environment = find(rendered(case), "ConfigMap", "-environment")
        assert {c.name for c in train.config_maps} == {environment["metadata"]["name"]}
        assert set(train.config_maps[0].env.values()) == environment["data"].keys()


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
    closed = run_helm("template", "r", str(CHART), "--set", "networkPolicy.egress.hub.enabled=false").stdout
    assert "name: r-spectraqlora-hub" not in closed and "name: r-spectraqlora-s3" in closed


def test_the_hook_creates_the_recurring_run_and_removes_it_with_the_release() -> None:
    objects = rendered("full")
    publish, remove = find(objects, "Job", "-publish"), find(objects, "Job", "-unschedule")
    assert publish["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade,post-rollback"
    assert remove["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"
    arguments = publish["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:5] == ["schedule", "create", "nightly", "--cron", "30 2 * * *"]
    cron = find(rendered("minimal", "schedule.mode=cronjob"), "CronJob")["spec"]
    assert cron["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][0] == "submit"
    assert cron["concurrencyPolicy"] == "Forbid"


@pytest.mark.parametrize("case", ["full", "minimal"])
def test_the_hooks_own_command_publishes_to_kubeflow_pipelines(case: str, tmp_path: Path) -> None:
    from tests.kfp_server import KfpServer

    objects = rendered(case)
    data = find([o for o in objects if "settings.yaml" in o.get("data", {})], "ConfigMap")["data"]
    if case == "minimal":
        settings = yaml.safe_load(data["settings.yaml"])
        settings |= {"model": {"base_model": "owner/model"}, "data": {"source": "owner/data"}}
        data["settings.yaml"] = yaml.safe_dump(settings)
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    container = find(objects, "Job", "-publish")["spec"]["template"]["spec"]["containers"][0]
    with KfpServer() as server:
        command = [sys.executable, *container["command"][1:]]
        arguments = [a.replace("/etc/spectraqlora", str(tmp_path)) for a in container["args"]]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": str(tmp_path), "SPECTRAQLORA_KFP_HOST": server.endpoint},
        )
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
    names = {e["name"] for e in container["env"]} - {"HOME"}
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
        for case, words in (("default", "spectraqlora submit"), ("full", "spectraqlora schedule list")):
            notes = chart.render(values_of(case), name="release", namespace="team")[
                "spectraqlora/templates/NOTES.txt"
            ]
            assert words in notes and "helm test release --namespace team" in notes


def test_helm_packages_it(tmp_path: Path) -> None:
    assert run_helm("package", str(CHART), "--destination", str(tmp_path)).returncode == 0
    assert (ROOT / "charts").is_dir() and next(tmp_path.glob("spectraqlora-*.tgz")).stat().st_size > 5000
