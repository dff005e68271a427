"""Argo Workflows through Kubernetes' API: templates, runs and schedules are objects of the namespace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from spectraqlora.errors import InputError

from spectraqlora_pipelines.cluster.kube import TIMEOUT_S, Away, asking, connect
from spectraqlora_pipelines.cluster.pods import unpacked

RUN = "spectraqlora/run"
"""Label of workflows: the name that people know a run, or the runs of a schedule, by."""
OWNER = "spectraqlora/owner"
"""Annotation of schedules: who keeps it."""
_GROUP, _VERSION = "argoproj.io", "v1alpha1"
_PLURALS = {
    "Workflow": "workflows",
    "WorkflowTemplate": "workflowtemplates",
    "CronWorkflow": "cronworkflows",
}
_GONE_WITHIN_S = 60
"""How long what is being deleted may still be there: Kubernetes answers before its controllers have let go of it."""
_WRITES = 5
"""How often an object is read and written where another, such as Argo's controller, writes it in between."""
Done = Literal["created", "changed", "unchanged"]


class Argo:
    """Argo Workflows in one namespace.

    Args:
        namespace: of the runs; empty is that of the kubeconfig's context.

    Raises:
        NoAccess: no cluster is known.
    """

    def __init__(self, namespace: str = "") -> None:
        from kubernetes import client

        own = connect()
        self.namespace = namespace or own
        self._objects = client.CustomObjectsApi()

    def _place(self, kind: str) -> tuple[str, str, str, str]:
        return _GROUP, _VERSION, self.namespace, _PLURALS[kind]

    def _find(self, kind: str, name: str) -> dict[str, Any] | None:
        from kubernetes.client import ApiException

        with asking(self.namespace):
            try:
                found = self._objects.get_namespaced_custom_object(
                    *self._place(kind), name, _request_timeout=TIMEOUT_S
                )
                return {"metadata": found["metadata"], **found}
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

    def _settled(self, kind: str, name: str) -> dict[str, Any] | None:
        """An object that stays; one that is being deleted is waited for until it is gone."""
        end = time.monotonic() + _GONE_WITHIN_S
        while (there := self._find(kind, name)) and _leaving(there):
            if time.monotonic() > end:
                kept_by = ", ".join(there["metadata"].get("finalizers") or ["-"])
                raise Away(
                    "NAME", name, f"a {kind} whose deletion ends within {_GONE_WITHIN_S} s; kept by {kept_by}"
                )
            time.sleep(0.2)
        return there

    def _change(self, kind: str, name: str, edit: Callable[[dict[str, Any]], bool]) -> bool | None:
        """Let `edit` change an object, which says whether it did; None where there is no such object."""
        from kubernetes.client import ApiException

        for left in reversed(range(_WRITES)):
            there = self._settled(kind, name)
            if there is None or not edit(there):
                return None if there is None else False
            with asking(self.namespace):
                try:
                    self._objects.replace_namespaced_custom_object(
                        *self._place(kind), name, there, _request_timeout=TIMEOUT_S
                    )
                    break
                except ApiException as error:
                    if error.status != 409 or not left:
                        raise
            time.sleep(0.2)
        return True

    def _list(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        with asking(self.namespace):
            found = self._objects.list_namespaced_custom_object(
                *self._place(kind), label_selector=selector, _request_timeout=TIMEOUT_S
            )
            return list(found["items"])

    def apply(self, document: dict[str, Any]) -> Done:
        """Create an object, or change it to what is given; runs under way keep what they began with."""
        kind, name = document["kind"], document["metadata"]["name"]

        def edit(there: dict[str, Any]) -> bool:
            kept = {key: there["metadata"].get(key) or {} for key in ("labels", "annotations")}
            given = {key: {**kept[key], **document["metadata"].get(key, {})} for key in kept}
            if there["spec"] == document["spec"] and given == kept:
                return False
            there["metadata"] |= given
            there["spec"] = document["spec"]
            return True

        changed = self._change(kind, name, edit)
        if changed is None:
            self.create(document)
            return "created"
        return "changed" if changed else "unchanged"

    def create(self, document: dict[str, Any]) -> str:
        """Create an object; its name."""
        with asking(self.namespace):
            made = self._objects.create_namespaced_custom_object(
                *self._place(document["kind"]), document, _request_timeout=TIMEOUT_S
            )
            return str(made["metadata"]["name"])

    def workflow(self, wanted: str) -> dict[str, Any]:
        """A workflow by its own name, or the newest of a run's or a schedule's name.

        Raises:
            InputError: there is none.
        """
        found = self._find("Workflow", wanted)
        if found is None:
            of_name = self._list("Workflow", f"{RUN}={wanted}")
            if not of_name:
                expected = f"a workflow in namespace {self.namespace}, or the name of a run or schedule there"
                raise InputError("RUN", wanted, expected)
            found = max(of_name, key=lambda workflow: str(workflow["metadata"]["creationTimestamp"]))
        return unpacked(found)

    def schedules(self) -> list[dict[str, Any]]:
        """The schedules of this program, by name."""
        found = [
            cron for cron in self._list("CronWorkflow") if OWNER in _annotations(cron) and not _leaving(cron)
        ]
        return sorted(found, key=lambda cron: str(cron["metadata"]["name"]))

    def schedules_of(self, owner: str) -> list[str]:
        """Names of the schedules that `owner` keeps."""
        return [cron["metadata"]["name"] for cron in self.schedules() if _annotations(cron)[OWNER] == owner]

    def change(self, name: str, action: Literal["pause", "resume", "delete"]) -> bool:
        """Pause, resume or delete a schedule; runs under way continue. Whether it was there.

        Raises:
            InputError: there is none to pause or resume.
        """
        if action == "delete":
            return self._delete("CronWorkflow", name)
        suspend = action == "pause"

        def edit(there: dict[str, Any]) -> bool:
            before, there["spec"]["suspend"] = there["spec"].get("suspend", False), suspend
            return bool(before != suspend)

        if self._change("CronWorkflow", name, edit) is None:
            names = ", ".join(cron["metadata"]["name"] for cron in self.schedules()) or "there is none"
            raise InputError("NAME", name, f"an existing schedule ({names})")
        return True

    def _delete(self, kind: str, name: str) -> bool:
        """Delete an object but not what it has made, and wait until it is gone; whether it was there."""
        from kubernetes.client import ApiException

        if self._settled(kind, name) is None:
            return False
        with asking(self.namespace):
            try:
                # A schedule's runs are its own in Kubernetes' eyes, and would be deleted with it.
                self._objects.delete_namespaced_custom_object(
                    *self._place(kind), name, propagation_policy="Orphan", _request_timeout=TIMEOUT_S
                )
            except ApiException as error:
                if error.status != 404:
                    raise
        self._settled(kind, name)
        return True


def _annotations(document: dict[str, Any]) -> dict[str, str]:
    return document["metadata"].get("annotations") or {}


def _leaving(document: dict[str, Any]) -> bool:
    return "deletionTimestamp" in document["metadata"]
