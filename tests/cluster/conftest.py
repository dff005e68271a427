"""The Kubernetes cluster with Argo Workflows that these tests use: the one that is there, never a fake.

KUBECONFIG names it; else SPECTRAQLORA_TEST_CLUSTER names a program that starts one by `argo` and prints its variables by
`env`. SPECTRAQLORA_TEST_NAMESPACE is a namespace that Argo's controller watches, kubeflow unless told.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import pytest
from spectraqlora.errors import InputError

ACCOUNT = "spectraqlora-test"


@pytest.fixture(scope="session")
def namespace() -> Iterator[str]:
    """The namespace of the runs, with a service account for the steps."""
    from kubernetes import client
    from kubernetes.client import ApiException
    from spectraqlora_pipelines.cluster.argo_client import Argo

    program = os.environ.get("SPECTRAQLORA_TEST_CLUSTER")
    if not os.environ.get("KUBECONFIG"):
        if not program:
            pytest.skip("no cluster: KUBECONFIG, or SPECTRAQLORA_TEST_CLUSTER, names one")
        subprocess.run([program, "argo"], check=True)
        told = subprocess.run([program, "env"], check=True, capture_output=True, text=True).stdout
        os.environ["KUBECONFIG"] = re.findall(r"KUBECONFIG=(\S+)", told)[0]
    name = os.environ.get("SPECTRAQLORA_TEST_NAMESPACE", "kubeflow")
    try:
        Argo(name).schedules()
    except InputError as error:
        pytest.skip(f"no cluster with Argo Workflows: {error}")
    core, rights = client.CoreV1Api(), client.RbacAuthorizationV1Api()
    meta = {"name": ACCOUNT}
    rule = {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": ACCOUNT}
    subjects = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": name}]
    for create, body in (
        (core.create_namespaced_service_account, {"metadata": meta}),
        (rights.create_namespaced_role, {"metadata": meta, "rules": [rule]}),
        (
            rights.create_namespaced_role_binding,
            {"metadata": meta, "roleRef": reference, "subjects": subjects},
        ),
    ):
        try:
            create(name, body)
        except ApiException as error:
            assert error.status == 409, error
    yield name
    core.delete_namespaced_service_account(ACCOUNT, name)
    rights.delete_namespaced_role_binding(ACCOUNT, name)
    rights.delete_namespaced_role(ACCOUNT, name)
