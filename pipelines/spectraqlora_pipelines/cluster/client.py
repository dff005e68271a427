"""Kubeflow Pipelines through kfp.Client: pipeline versions, runs now, recurring runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectraqlora import __version__
from spectraqlora.errors import InputError, NoAnswer, busy, holds_secret, passing

_PAGE = 100
_OWNED = "Kept by "
"""Before the owner's name in a recurring run's description: KFP has no labels for recurring runs."""
_OTHER_SHAPE = (AttributeError, TypeError, ValueError, RecursionError)
"""What KFP's client raises where an answer is not shaped as KFP's are."""
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Connection:
    """Where the API is and how to be let in; the secrets come from the environment or from files.

    Args:
        host: address of the Kubeflow Pipelines API or UI.
        namespace: of a multi-user installation; empty on a standalone one.
        token: bearer token.
        token_file: file with a token that somebody keeps fresh, such as a projected service account token.
        cookie: session cookie of the installation's login.
        ca_file: certificates that vouch for the host.
    """

    host: str
    namespace: str = ""
    token: str = ""
    token_file: str = ""
    cookie: str = ""
    ca_file: str = ""


@dataclass(frozen=True)
class Launch:
    """What a run or a recurring run has besides its arguments."""

    experiment: str
    service_account: str | None = None
    pipeline_root: str | None = None


@dataclass(frozen=True)
class Uploaded:
    """A pipeline version on the server; `new` where this call uploaded it."""

    pipeline_id: str
    version_id: str
    name: str
    new: bool


def version_name(package: Path) -> str:
    """Name of a pipeline version: the program's version and the digest of the compiled pipeline."""
    return f"{__version__}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"


class Kubeflow:
    """One connection to Kubeflow Pipelines.

    Raises:
        InputError: nobody answers at the host, or the answer is no.
    """

    def __init__(self, connection: Connection) -> None:
        self.host, self.namespace = connection.host, connection.namespace or None
        if not connection.host:
            raise InputError("--host", "", "the address of Kubeflow Pipelines, or SPECTRAQLORA_KFP_HOST")
        if holds_secret(connection.host):
            expected = (
                "an address without user, password or token; SPECTRAQLORA_KFP_TOKEN, or _COOKIE, sign in"
            )
            raise InputError("--host", connection.host, expected)
        for option, path in (("--token-file", connection.token_file), ("--ca-file", connection.ca_file)):
            if path and not Path(path).is_file():
                raise InputError(option, path, "an existing file")
        with self._asking():
            from kfp import Client
            from kfp.client import ServiceAccountTokenVolumeCredentials

            credentials = None
            if connection.token_file:
                credentials = ServiceAccountTokenVolumeCredentials(connection.token_file)
            try:
                self._client = Client(
                    host=connection.host,
                    namespace=connection.namespace or "kubeflow",
                    existing_token=connection.token or None,
                    credentials=credentials,
                    cookies=connection.cookie or None,
                    ssl_ca_cert=connection.ca_file or None,
                )
            except _OTHER_SHAPE:  # It reads the answer before it looks at it.
                raise self._no_kubeflow() from None
        self._check_answers(self._client._run_api.api_client)

    def _no_kubeflow(self) -> InputError:
        return InputError("--host", self.host, "a Kubeflow Pipelines API; what answers there is none")

    def _check_answers(self, client: Any) -> None:
        """Of what is no JSON object, such as an answer whose body was lost, KFP's client makes an empty message."""
        read = client.deserialize

        def checked(response: Any, response_type: Any) -> Any:
            try:
                if not isinstance(json.loads(response.data), dict):
                    raise TypeError
                return read(response, response_type)
            except _OTHER_SHAPE:
                raise self._no_kubeflow() from None

        client.deserialize = checked

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Without the client's own chatter; refusals and silence become one line."""
        from kfp_server_api.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        logging.getLogger("urllib3").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except ApiException as error:
            expected = {
                401: "a token or cookie that Kubeflow Pipelines accepts; it answered 401",
                403: f"permission in namespace {self.namespace or '(none given)'}; it answered 403",
                404: "a Kubeflow Pipelines v2 API; it answered 404",
            }.get(error.status, f"an answer other than {error.status}: {_message(error)}")
            kind = NoAnswer if busy(error.status) else InputError
            raise kind("--host", self.host, expected) from None
        except (HTTPError, TimeoutError, OSError) as error:
            # Of a server that starts KFP's client says no more than that it asked so often.
            silent = passing(error) or "Failed getting healthz" in str(error)
            kind = NoAnswer if silent else InputError
            raise kind("--host", self.host, f"a reachable Kubeflow Pipelines API ({error})") from None

    def upload(self, package: Path, pipeline: str, description: str) -> Uploaded:
        """Upload a compiled pipeline as a version named by its content; one that is there stays as it is."""
        import kfp_server_api

        name = version_name(package)
        with self._asking():
            known = self._client.list_pipelines(filter=_named(pipeline), namespace=self.namespace).pipelines
            if known:
                pipeline_id = known[0].pipeline_id
            else:
                new = kfp_server_api.V2beta1Pipeline(
                    display_name=pipeline, name=pipeline, description=description, namespace=self.namespace
                )
                pipeline_id = self._client.pipelines.pipeline_service_create_pipeline(new).pipeline_id
            versions = self._client.list_pipeline_versions(pipeline_id, filter=_named(name)).pipeline_versions
            if versions:
                return Uploaded(pipeline_id, versions[0].pipeline_version_id, name, False)
            version = self._client.upload_pipeline_version(str(package), name, pipeline_id=pipeline_id)
        return Uploaded(pipeline_id, version.pipeline_version_id, name, True)

    def _experiment(self, name: str) -> str:
        experiment = self._client.create_experiment(name, namespace=self.namespace)
        return str(experiment.experiment_id)

    def submit(self, uploaded: Uploaded, name: str, arguments: dict[str, Any], launch: Launch) -> str:
        """Start a run of an uploaded version; its id."""
        with self._asking():
            run = self._client.run_pipeline(
                self._experiment(launch.experiment),
                name,
                params=arguments,
                pipeline_id=uploaded.pipeline_id,
                version_id=uploaded.version_id,
                pipeline_root=launch.pipeline_root,
                service_account=launch.service_account,
            )
        return str(run.run_id)

    def run_address(self, run_id: str, ui: str = "") -> str:
        """Where the UI, at the host where no other address is given, shows a run."""
        return f"{(ui or self.host).rstrip('/')}/#/runs/details/{run_id}"

    def run(self, wanted: str) -> Any:
        """A run by its id, or the newest of a name.

        Raises:
            InputError: there is none.
        """
        from kfp_server_api.exceptions import ApiException

        expected = "a run's id or name, as submit prints them"
        with self._asking():
            if not _ID.fullmatch(wanted):
                runs = self._client.list_runs(
                    page_size=1,
                    sort_by="created_at desc",
                    namespace=self.namespace,
                    filter=_named(wanted),
                ).runs
                if not runs:
                    raise InputError("RUN", wanted, expected)
                wanted = runs[0].run_id
            try:
                found = self._client.get_run(wanted)
            except ApiException as error:
                if error.status == 404:
                    raise InputError("RUN", wanted, expected) from None
                raise
        if not found.run_id:
            raise self._no_kubeflow()
        return found

    def pipeline_of(self, run: Any) -> dict[str, Any]:
        """The compiled pipeline of a run."""
        spec = run.pipeline_spec
        if not spec:
            reference = run.pipeline_version_reference
            with self._asking():
                spec = self._client.get_pipeline_version(
                    reference.pipeline_id, reference.pipeline_version_id
                ).pipeline_spec
        # A version with a platform part holds both.
        return dict(spec.get("pipeline_spec") or spec)

    def schedules(self, name: str = "") -> list[Any]:
        """Recurring runs, all or those of one name, oldest first."""
        runs: list[Any] = []
        token = ""
        with self._asking():
            while True:
                page = self._client.list_recurring_runs(
                    page_token=token,
                    page_size=_PAGE,
                    namespace=self.namespace,
                    filter=_named(name) if name else None,
                )
                runs += page.recurring_runs or []
                token = page.next_page_token or ""
                if not token:
                    return sorted(runs, key=lambda run: str(run.created_at))

    def schedule(
        self,
        uploaded: Uploaded,
        name: str,
        arguments: dict[str, Any],
        launch: Launch,
        cron: str = "",
        every_seconds: int = 0,
        enabled: bool = True,
        owner: str = "",
    ) -> str:
        """Make the recurring run of that name be this one: `created`, `updated` or `unchanged`.

        Missed times are not made up for, and a run starts only when the one before it has ended. KFP cannot
        change a recurring run, so the new one is created before the old one is deleted: no time is missed in
        between. A run under way continues as it was started, and the first run of the new schedule does not
        wait for it. A paused one stays paused. Its owner is in the recurring run's description, and stays where
        none is given.

        Raises:
            InputError: the name belongs to another owner.
        """
        with self._asking():
            experiment = self._experiment(launch.experiment)
        before = self.schedules(name)
        for run in before:
            if owner and owner_of(run) not in ("", owner):
                raise InputError("NAME", name, f"a name of its own; this schedule is kept by {owner_of(run)}")
        owner = owner or next(filter(None, map(owner_of, before)), "")
        wanted = {
            "owner": owner,
            "version": uploaded.version_id,
            "parameters": json.loads(json.dumps(arguments)),
            "cron": cron,
            "every": every_seconds,
            "experiment": experiment,
            "service_account": launch.service_account or "",
            "pipeline_root": launch.pipeline_root or "",
        }
        if len(before) == 1 and _content(before[0]) == wanted:
            return "unchanged"
        paused = bool(before) and all(run.mode == "DISABLE" for run in before)
        with self._asking():
            self._client.create_recurring_run(
                experiment,
                name,
                description=f"{_OWNED}{owner}" if owner else None,
                cron_expression=cron or None,
                interval_second=every_seconds or None,
                max_concurrency=1,
                no_catchup=True,
                params=arguments,
                pipeline_id=uploaded.pipeline_id,
                version_id=uploaded.version_id,
                enabled=enabled and not paused,
                pipeline_root=launch.pipeline_root,
                service_account=launch.service_account,
            )
            for run in before:
                self._delete_recurring_run(run.recurring_run_id)
        return "updated" if before else "created"

    def schedules_of(self, owner: str) -> list[Any]:
        """Recurring runs that this owner keeps, whatever their names are."""
        return [run for run in self.schedules() if owner_of(run) == owner]

    def _delete_recurring_run(self, number: str) -> None:
        """Delete a recurring run alone.

        KFP makes a recurring run the owner of its workflows, and Kubernetes deletes what is owned with its owner
        unless it is told to leave orphans. The API takes that from KFP 2.16 on; `kfp.Client` has no argument for it.
        """
        self._client._recurring_run_api.recurring_run_service_delete_recurring_run(
            number, propagation_policy="ORPHAN"
        )

    def change(self, name: str, action: str) -> int:
        """`pause`, `resume` or `delete` the recurring runs of a name; how many there were. Runs under way continue.

        Raises:
            InputError: pause or resume of one that is not there. Deleting it twice is fine.
        """
        runs = self.schedules(name)
        if not runs and action != "delete":
            known = ", ".join(sorted({run.display_name for run in self.schedules()})) or "there is none"
            raise InputError("NAME", name, f"an existing schedule; {known}")
        act = {
            "pause": self._client.disable_recurring_run,
            "resume": self._client.enable_recurring_run,
            "delete": self._delete_recurring_run,
        }[action]
        with self._asking():
            for run in runs:
                act(run.recurring_run_id)
        return len(runs)


def owner_of(run: Any) -> str:
    """Who keeps a recurring run; empty where nobody is named."""
    description = run.description or ""
    return description.removeprefix(_OWNED) if description.startswith(_OWNED) else ""


def timing(run: Any) -> str:
    """When a recurring run starts, in words."""
    if run.trigger and run.trigger.cron_schedule:
        return f"cron {run.trigger.cron_schedule.cron}"
    if run.trigger and run.trigger.periodic_schedule:
        return f"every {int(run.trigger.periodic_schedule.interval_second)} s"
    return ""


def _content(run: Any) -> dict[str, Any]:
    cron = run.trigger.cron_schedule if run.trigger else None
    periodic = run.trigger.periodic_schedule if run.trigger else None
    runtime, reference = run.runtime_config, run.pipeline_version_reference
    return {
        "owner": owner_of(run),
        "version": reference.pipeline_version_id if reference else "",
        "parameters": (runtime.parameters if runtime else None) or {},
        "cron": (cron.cron if cron else "") or "",
        "every": int(periodic.interval_second) if periodic else 0,
        "experiment": run.experiment_id,
        "service_account": run.service_account or "",
        "pipeline_root": (runtime.pipeline_root if runtime else "") or "",
    }


def _named(name: str) -> str:
    """KFP's filter for a display name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body).get("message") or error.reason)
    except (TypeError, ValueError, AttributeError):
        return str(error.reason)
