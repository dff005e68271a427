"""Kubernetes as this machine's kubeconfig, or a pod's service account, reaches it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectraqlora.errors import InputError, NoAnswer, busy, passing

TIMEOUT_S = 15
OTHER_SHAPE = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What reading an answer raises that is not shaped as Kubernetes' are, such as one whose body was lost."""
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class NoAccess(InputError):
    """Kubernetes cannot be asked from here."""


class Away(NoAccess, NoAnswer):
    """Kubernetes does not answer, or answers that it cannot now."""


def connect() -> str:
    """Let Kubernetes' client find the cluster; returns the namespace of the kubeconfig's context, or of the pod.

    Raises:
        NoAccess: neither a kubeconfig nor a pod's service account names a cluster.
    """
    from kubernetes import config

    logging.getLogger("urllib3").setLevel(logging.ERROR)
    files = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    try:
        if any(os.path.isfile(file) for file in files.split(os.pathsep)):
            config.load_kube_config(files)
            _, context = config.list_kube_config_contexts(files)
            return str(context["context"].get("namespace") or "default")
        config.load_incluster_config()
        return _OWN_NAMESPACE.read_text(encoding="utf-8")
    except Exception as error:  # A broken file shows in errors of many kinds.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NoAccess("kubeconfig", "", f"a KUBECONFIG of the cluster ({first})") from None


def _message(error: Any) -> str:
    """What Kubernetes says of a refusal; empty where it says nothing."""
    try:
        return f": {json.loads(error.body)['message']}"
    except (TypeError, ValueError, LookupError):
        return ""


@contextlib.contextmanager
def asking(namespace: str) -> Iterator[None]:
    """Refusals, silence and answers that are none as one line; what is wanted of an answer is read inside.

    Raises:
        NoAccess: instead of the client's own errors.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        answered = f"Kubernetes answered {error.status} {error.reason}"
        if error.status == 404:
            raise NoAccess(
                "namespace", namespace, f"one of a cluster with Argo Workflows; {answered}"
            ) from None
        if error.status in (401, 403):
            raise NoAccess(
                "kubeconfig", namespace, f"permission in namespace {namespace}; {answered}"
            ) from None
        kind = Away if error.status == 409 or busy(error.status) else NoAccess
        raise kind("kubeconfig", namespace, f"another answer; {answered}{_message(error)}") from None
    except (HTTPError, OSError) as error:
        kind = Away if passing(error) else NoAccess
        raise kind("kubeconfig", namespace, f"a cluster that answers ({error})") from None
    except OTHER_SHAPE:
        expected = "a Kubernetes API; what answers there is none, or its answer was cut"
        raise NoAccess("kubeconfig", namespace, expected) from None
