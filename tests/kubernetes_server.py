"""A Kubernetes API for tests: the three reads that `spectraqlora status` and `logs` make, for Kubernetes' own client.

Pods, lists and refusals are those that `tests/cluster/record.py` recorded on a Kubernetes, under other names.
"""

from __future__ import annotations

import copy
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.http_server import Serving

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "unit" / "recorded" / "kubernetes.json").read_text(encoding="utf-8")
)
_WORKFLOWS = re.compile(r"/apis/argoproj\.io/v1alpha1/namespaces/([^/]+)/workflows")
_PODS = re.compile(r"/api/v1/namespaces/([^/]+)/pods")
_LOG = re.compile(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)/log")


def pod(
    name: str,
    run_id: str,
    step: str,
    method: str = "",
    created: str = "2026-11-26T13:00:00Z",
    became: str = "running",
    says: str = "",
) -> dict[str, Any]:
    """A pod of a step's attempt.

    Args:
        name: of the pod.
        run_id: of KFP's run.
        step: of the run.
        method: of the branch.
        created: when.
        became: which of the recorded pods it is like.
        says: instead of what the recorded pod's status says of itself.
    """  # fmt: skip
    found = copy.deepcopy(RECORDED["pods"][became])
    labels = {"pipeline/runid": run_id, "spectraqlora/step": step}
    if method:
        labels["spectraqlora/method"] = method
    found["metadata"] |= {"name": name, "labels": labels, "creationTimestamp": created}
    if says:
        found["status"]["message"] = says
    return dict(found)


class KubernetesServer(Serving):
    """Serves what it is given at `endpoint`.

    Args:
        folder: gets the kubeconfig that names it.
    """

    def __init__(self, folder: Path) -> None:
        self.workflows, self.pods = list[dict[str, Any]](), list[dict[str, Any]]()
        self.logs: dict[str, str] = {}
        self.refuses = False
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                status, kind, text = owner.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.kubeconfig = folder / "kubeconfig"
        cluster = {"name": "test", "cluster": {"server": self.endpoint}}
        context = {"name": "test", "context": {"cluster": "test", "user": "me"}}
        self.kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "test", "clusters": [cluster],
                    "contexts": [context], "users": [{"name": "me", "user": {}}],
                }
            )
        )  # fmt: skip

    def answer(self, target: str) -> tuple[int, str, bytes]:
        """Status, content type and body of a GET."""
        parts = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if self.refuses:
            return self._recorded("forbidden")
        if _WORKFLOWS.fullmatch(parts.path):
            return self._list("workflow list", self.workflows, query)
        if _PODS.fullmatch(parts.path):
            return self._list("pod list", self.pods, query)
        if found := _LOG.fullmatch(parts.path):
            if found[2] not in self.logs:
                there = any(known["metadata"]["name"] == found[2] for known in self.pods)
                return self._recorded(
                    "log of a container that waits" if there else "log of a pod that is gone"
                )
            assert query["container"] == "main"
            status, kind, _ = self._recorded("log, its last line")
            lines = self.logs[found[2]].splitlines(keepends=True)
            return status, kind, "".join(lines[-int(query.get("tailLines", 10**6)) :]).encode()
        raise AssertionError(f"nobody asks for {target}")

    @staticmethod
    def _recorded(name: str) -> tuple[int, str, bytes]:
        found = RECORDED[name]
        return found["status"], found["type"], found["body"].encode()

    @staticmethod
    def _list(name: str, items: list[dict[str, Any]], query: dict[str, str]) -> tuple[int, str, bytes]:
        for part in query["labelSelector"].split(","):
            key, equals, value = part.partition("=")
            has = [(item, item["metadata"]["labels"].get(key)) for item in items]
            items = [item for item, label in has if (label == value if equals else label is not None)]
        return 200, "application/json", json.dumps({**RECORDED[name], "items": items}).encode()
