"""What a deleted run leaves in a store: nothing. Ceph's radosgw is the store; rclone's S3 cannot delete a folder's name."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes import client
from spectraqlora_pipelines.cluster.argo_client import Argo

from tests.ceph import Ceph, missing_programs
from tests.cluster.conftest import GROUP, RELEASE, Release, workflows
from tests.cluster.runs import pods_of, submit
from tests.cluster.services import Store, eventually
from tests.s3 import ACCESS_KEY, BUCKET, SECRET_KEY

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}: tests/install_servers.sh"
    ),
]
REPOSITORY = f"{RELEASE}-repository"


def own_address() -> str:
    """This machine's address as the cluster's nodes see it."""
    api = urlsplit(client.Configuration.get_default_copy().host)
    with socket.create_connection((api.hostname, api.port), timeout=5) as connection:
        return str(connection.getsockname()[0])


@pytest.fixture
def ceph(namespace: str, tmp_path: Path) -> Iterator[Ceph]:
    """A node of Ceph, and a ConfigMap that names it as the artifact repository."""
    core, keys = client.CoreV1Api(), {"access": ACCESS_KEY, "secret": SECRET_KEY}
    with Ceph(tmp_path / "ceph", own_address()) as running:
        s3 = {
            "endpoint": urlsplit(running.endpoint).netloc,
            "insecure": True,
            "bucket": BUCKET,
            "keyFormat": "artifacts/{{workflow.name}}/{{pod.name}}",
            "accessKeySecret": {"name": REPOSITORY, "key": "access"},
            "secretKeySecret": {"name": REPOSITORY, "key": "secret"},
        }
        meta = {"metadata": {"name": REPOSITORY}}
        secret = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
        core.create_namespaced_secret(namespace, {**meta, "data": secret})
        core.create_namespaced_config_map(namespace, {**meta, "data": {"ceph": yaml.safe_dump({"s3": s3})}})
        yield running
        core.delete_namespaced_config_map(REPOSITORY, namespace)
        core.delete_namespaced_secret(REPOSITORY, namespace)


def test_a_deleted_run_leaves_no_artifact(
    argo: Argo, release: Release, store: Store, ceph: Ceph, sample: None, tmp_path: Path
) -> None:
    values = yaml.safe_load(release.values.read_text())
    values["argo"] |= {"repository": {"config_map": REPOSITORY, "key": "ceph"}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))

    def keys() -> list[str]:
        listed: Any = ceph.client()
        return [entry["Key"] for entry in listed.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    submit(argo, release, "--set", "methods=qlora", values=tmp_path / "values.yaml")
    eventually(lambda: pods_of(argo, "snr-analyze"), 180)
    assert any("/four_bit/" in key for key in keys())
    name = argo.workflow(RELEASE)["metadata"]["name"]
    objects = client.CustomObjectsApi()
    objects.patch_namespaced_custom_object(
        *GROUP, argo.namespace, "workflows", name, {"spec": {"shutdown": "Terminate"}}
    )
    eventually(lambda: argo.workflow(RELEASE)["status"].get("finishedAt"), 120)
    objects.delete_namespaced_custom_object(*GROUP, argo.namespace, "workflows", name)
    eventually(lambda: name not in workflows(argo.namespace), 120)
    assert keys() == []
