"""Each step is given the credentials that it needs, and no others: on Kubeflow Pipelines and on Argo Workflows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from spectraqlora.errors import InputError
from spectraqlora.runtime.images import step_names
from spectraqlora.settings import parse
from spectraqlora_pipelines.cluster.credentials import NEEDED, Credential, credential_of
from spectraqlora_pipelines.cluster.values import ClusterValues, read_values
from spectraqlora_pipelines.dags.argo import template_for
from spectraqlora_pipelines.dags.catalogue import compile_dag

from tests.unit.test_images import reached

VALUES = """
defaults:
  secrets:
    - {name: s3, env: {AWS_ACCESS_KEY_ID: a, AWS_SECRET_ACCESS_KEY: b}}
    - {name: mlflow, env: {MLFLOW_TRACKING_USERNAME: u, MLFLOW_TRACKING_PASSWORD: p}}
    - {name: hub, env: {HF_TOKEN: t}}
    - {name: verifying, env: {SPECTRAQLORA_VERIFYING_KEY: key.pub}}
    - {name: netrc, mount: /etc/netrc}
    - {name: proxy, env: {PROXY_USER: u}}
steps:
  merge-export:
    secrets:
      - {name: hub, env: {HF_TOKEN: t}}
      - {name: signing, env: {SPECTRAQLORA_SIGNING_KEY: key.pem}}
"""
NAMES = {
    "s3": Credential.S3, "mlflow": Credential.MLFLOW, "hub": Credential.HUB, "verifying": Credential.VERIFYING,
}  # fmt: skip
RETRAINING = {"rounds": 2, "retrain": {"method": "hybrid", "start": "champion"}}


def expected(step: str) -> set[str]:
    if step == "merge-export":
        return {"hub", "signing"}
    return {name for name, kind in NAMES.items() if kind in NEEDED[step]} | {"netrc", "proxy"}


@pytest.fixture
def values(tmp_path: Path) -> ClusterValues:
    (tmp_path / "values.yaml").write_text(VALUES)
    return read_values(tmp_path / "values.yaml")


def test_every_step_has_its_row_and_training_has_no_token_of_the_hub() -> None:
    assert NEEDED.keys() == set(step_names())
    assert Credential.HUB not in NEEDED["train"] and Credential.MLFLOW not in NEEDED["prepare-data"]
    assert [step for step in NEEDED if Credential.SIGNING in NEEDED[step]] == ["merge-export"]
    for step in ("select-layers", "measure-base"):
        assert not NEEDED[step]


def test_a_compiled_pipeline_gives_each_step_its_own_secrets(values: ClusterValues, tmp_path: Path) -> None:
    compile_dag(tmp_path / "pipeline.yaml", "retraining", parse(RETRAINING), values)
    pipeline, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    seen = set()
    for label, executor in executors.items():
        arguments = pipeline["deploymentSpec"]["executors"][label]["container"]["args"]
        step = arguments[arguments.index("--function_to_execute") + 1].replace("_", "-")
        given = [*executor.get("secretAsEnv", []), *executor.get("secretAsVolume", [])]
        assert {secret["secretName"] for secret in given} == expected(step), step
        seen.add(step)
    assert seen == set(step_names())


def test_a_workflow_template_gives_each_step_its_own_secrets(values: ClusterValues) -> None:
    document = template_for("retraining", parse(RETRAINING), values)
    seen = set()
    for template in document["spec"]["templates"]:
        if container := template.get("container"):
            step = container["args"][0]
            assert _secrets(template) == expected(step), step
            seen.add(step)
    assert seen == set(step_names())


def _secrets(template: dict[str, Any]) -> set[str]:
    by_name = {
        entry["valueFrom"]["secretKeyRef"]["name"]
        for entry in template["container"]["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    return by_name | {v["secret"]["secretName"] for v in template.get("volumes", []) if "secret" in v}


def test_of_a_secret_for_several_a_step_is_given_the_variables_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(
        "defaults: {secrets: [{name: all, env: {HF_TOKEN: t, AWS_SECRET_ACCESS_KEY: s, MLFLOW_TRACKING_TOKEN: m}}]}"
    )
    found = read_values(tmp_path / "values.yaml")
    assert [secret.env for secret in found.step("prepare-data").secrets] == [
        {"HF_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s"}
    ]
    assert found.step("select-layers").secrets == ()
    (tmp_path / "values.yaml").write_text(
        "defaults: {secrets: [{name: s3, env: {AWS_SECRET_ACCESS_KEY: s}, all_steps: true}]}"
    )
    found = read_values(tmp_path / "values.yaml")
    assert all(len(found.step(step).secrets) == 1 for step in step_names())


def test_a_signing_key_for_all_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(
        "defaults: {secrets: [{name: s, env: {SPECTRAQLORA_SIGNING_KEY: key.pem}}]}"
    )
    with pytest.raises(
        InputError, match=r"^defaults\.secrets\.0\.env\.SPECTRAQLORA_SIGNING_KEY: 'key\.pem': .*merge-export"
    ):
        read_values(tmp_path / "values.yaml")


@pytest.mark.parametrize("step", step_names())
def test_the_table_says_what_a_steps_code_reaches(step: str) -> None:
    """Followed from the step's own modules: MLflow by `tracking`, keys by `signing`, a store by what asks one.

    A step may import more of `places` and `storage` than it asks, so for those what it needs must be reached, and not
    the other way round.
    """
    seen, _ = reached(step)
    assert (Credential.MLFLOW in NEEDED[step]) == ("spectraqlora.tracking.server" in seen)
    if {Credential.HUB, Credential.S3} & NEEDED[step].keys():
        assert {"spectraqlora.places", "spectraqlora.storage"} & seen
    if {Credential.SIGNING, Credential.VERIFYING} & NEEDED[step].keys():
        assert "spectraqlora.signing" in seen


@pytest.mark.parametrize(
    ("variable", "kind"),
    [
        ("AWS_SESSION_TOKEN", Credential.S3),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", Credential.S3),
        ("HF_TOKEN", Credential.HUB),
        ("HUGGING_FACE_HUB_TOKEN", Credential.HUB),
        ("MLFLOW_TRACKING_TOKEN", Credential.MLFLOW),
        ("SPECTRAQLORA_SIGNING_KEY", Credential.SIGNING),
        ("HTTPS_PROXY", None),
    ],
)
def test_a_credential_is_known_by_its_variable(variable: str, kind: Credential | None) -> None:
    assert credential_of(variable) is kind
