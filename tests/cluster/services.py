"""What tests outside of a cluster use of it: its services, by an address that this machine reaches, and its S3."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
from kubernetes import client

S3_SERVICE, S3_SECRET = "minio-service", "mlpipeline-minio-artifact"
"""As the manifests of Argo Workflows and of Kubeflow Pipelines call their store and its credentials."""
BUCKET = "mlpipeline"


@contextlib.contextmanager
def reached(namespace: str, service: str, port: int) -> Iterator[str]:
    """The address of a service: its own where this machine has a route to it, else a forwarded port."""
    inside = client.CoreV1Api().read_namespaced_service(service, namespace).spec.cluster_ip
    with contextlib.suppress(OSError), socket.create_connection((inside, port), timeout=2):
        yield f"http://{inside}:{port}"
        return
    command = ["kubectl", "--namespace", namespace, "port-forward", f"service/{service}", f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forwarding:
        assert forwarding.stdout is not None
        try:
            (local,) = re.findall(r"127\.0\.0\.1:(\d+)", forwarding.stdout.readline())
            yield f"http://127.0.0.1:{local}"
        finally:
            forwarding.terminate()


class Store:
    """The cluster's S3.

    Args:
        namespace: of its service and secret.
        endpoint: by which this machine reaches it.
    """

    def __init__(self, namespace: str, endpoint: str) -> None:
        secret = client.CoreV1Api().read_namespaced_secret(S3_SECRET, namespace).data
        user, password = (base64.b64decode(secret[key]).decode() for key in ("accesskey", "secretkey"))
        self.variables = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": password,
            "AWS_REGION": "us-east-1",
        }
        self.inside = f"http://{S3_SERVICE}.{namespace}.svc:9000"
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=user,
            aws_secret_access_key=password,
            region_name="us-east-1",
        )

    def put(self, folder: Path, prefix: str) -> None:
        """Upload the files of a folder."""
        for path in (path for path in folder.rglob("*") if path.is_file()):
            self._client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")

    def keys(self, prefix: str) -> list[str]:
        """The objects below a prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def get(self, prefix: str, folder: Path) -> Path:
        """Fetch what is below a prefix."""
        prefix = prefix.rstrip("/")
        for key in self.keys(prefix):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(BUCKET, key, str(path))
        return folder

    def remove(self, prefix: str) -> None:
        """Remove what is below a prefix."""
        for key in self.keys(prefix):
            self._client.delete_object(Bucket=BUCKET, Key=key)


def eventually(look: Callable[[], Any], seconds: float, every: float = 0.5) -> Any:
    """The first answer that is not empty."""
    ends = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < ends, f"nothing within {seconds:.0f} s"
        time.sleep(every)
    return found
