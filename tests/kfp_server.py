"""Kubeflow Pipelines for tests: an HTTP server that keeps state and holds every request against KFP's own API.

The definition is the one shipped in the package kfp-server-api, which is generated from KFP's swagger file:
paths, methods and query parameters stand in its API classes, field names and types in its models.
"""

from __future__ import annotations

import email
import email.policy
import inspect
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.http_server import Serving

_INT64 = {("V2beta1RecurringRun", "max_concurrency"), ("V2beta1PeriodicSchedule", "interval_second")}
"""Fields of type string with format int64, which grpc-gateway takes as numbers as well."""


@dataclass(frozen=True)
class Route:
    """One operation of the API."""

    name: str
    method: str
    pattern: re.Pattern[str]
    query: dict[str, str]
    required_query: frozenset[str]
    body: str | None
    upload: bool


def routes() -> list[Route]:
    """All operations, read from the generated API classes."""
    found = []
    for class_name in dir(kfp_server_api):
        if not class_name.endswith("ServiceApi"):
            continue
        for name, function in inspect.getmembers(getattr(kfp_server_api, class_name), inspect.isfunction):
            if not name.endswith("_with_http_info"):
                continue
            source = inspect.getsource(function)
            call = re.search(r"call_api\(\s*'([^']+)', '([A-Z]+)'", source)
            assert call, name
            types = dict(re.findall(r":type (\w+): ([\w(), ]+)", source))
            body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
            names = re.findall(r"query_params\.append\(\('([\w.]+)'", source)
            template = re.sub(r"\\{[^}]+\\}", r"([^/:]+)", re.escape(call[1]))
            required = set(re.findall(r"Missing the required parameter `(\w+)`", source))
            found.append(
                Route(
                    name.removesuffix("_with_http_info"),
                    call[2],
                    re.compile(template),
                    {n: types[n.replace(".", "_")].split(",")[0] for n in names},
                    frozenset(required & set(names)),
                    types[body[1]] if body else None,
                    "uploadfile" in types,
                )
            )
    assert len(found) > 25
    return found


def fault(value: Any, kind: str, where: str = "body", proto: bool = False) -> str | None:
    """What is wrong with a JSON value of an openapi type; None where nothing is.

    Args:
        value: to check.
        kind: name of the type in kfp-server-api.
        where: path of the value, for the message.
        proto: whether a protobuf message in JSON is read, where names may be in camel case and enums numbers.
    """
    if value is None:
        return None
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return f"{where}: a list"
        return next(
            (f for i, v in enumerate(value) if (f := fault(v, found[1], f"{where}[{i}]", proto))), None
        )
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            return f"{where}: an object"
        return next((f for k, v in value.items() if (f := fault(v, found[1], f"{where}.{k}", proto))), None)
    if kind == "object":
        return None
    if kind in ("str", "int", "bool", "float"):
        wanted = {"str": str, "int": int, "bool": bool, "float": (int, float)}[kind]
        good = isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))  # type: ignore[arg-type]
        return None if good else f"{where}: {value!r} is no {kind}"
    if kind == "datetime":
        try:
            datetime.fromisoformat(value)
            return None
        except (TypeError, ValueError):
            return f"{where}: {value!r} is no RFC 3339 time"
    model = getattr(kfp_server_api, kind)
    if allowed := getattr(model, "allowable_values", None):
        number = proto and isinstance(value, int) and 0 <= value < len(allowed)
        return None if number or value in allowed else f"{where}: {value!r} is not one of {allowed}"
    if not isinstance(value, dict):
        return f"{where}: an object of {kind}"
    attributes = {json_name: name for name, json_name in model.attribute_map.items()}
    if proto:
        attributes |= {re.sub(r"_(\w)", lambda m: m[1].upper(), k): n for k, n in attributes.items()}
    for key, inner in value.items():
        if key not in attributes:
            return f"{where}.{key}: not a field of {kind}"
        if (kind, attributes[key]) in _INT64 and isinstance(inner, int):
            continue
        if wrong := fault(inner, model.openapi_types[attributes[key]], f"{where}.{key}", proto):
            return wrong
    return None


@dataclass
class State:
    """What the server holds."""

    pipelines: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    recurring: dict[str, dict[str, Any]] = field(default_factory=dict)


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KfpServer(Serving):
    """Serves the API at `endpoint`.

    Args:
        token: bearer token that requests must carry; empty asks for none.
        cookie: cookie that requests must carry; empty asks for none.
        multi_user: whether requests must name a namespace.
    """

    def __init__(self, token: str = "", cookie: str = "", multi_user: bool = False) -> None:
        self.token, self.cookie, self.multi_user = token, cookie, multi_user
        self.state, self.problems, self.requests = State(), list[str](), list[str]()
        self.page_size_limit = 2
        self.on_look: Callable[[dict[str, Any]], None] = lambda run: None
        """Called with a run before it is shown, as time passes on a cluster."""
        self.routes = routes()
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> dict[str, Any]:
        """Check a request against the definition, then do it."""
        parts = urlsplit(target)
        path = unquote(parts.path)
        self.requests.append(f"{method} {path}")
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, "no such token")
        if self.cookie and headers.get("Cookie") != self.cookie:
            raise Refused(401, "no such cookie")
        route = next((r for r in self.routes if r.method == method and r.pattern.fullmatch(path)), None)
        if route is None:
            raise Refused(404, f"{method} {path} is not in the API")
        matched = route.pattern.fullmatch(path)
        assert matched
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        for name in route.required_query - query.keys():
            raise Refused(400, f"{route.name}: query {name} is missing")
        for name, text in query.items():
            if name not in route.query:
                raise Refused(400, f"{route.name}: {name} is no query parameter")
            if route.query[name] == "int" and not text.isdigit():
                raise Refused(400, f"{route.name}: {name} is {text!r}, no int")
        if query.get("filter"):
            wrong = fault(json.loads(query["filter"]), "V2beta1Filter", "filter", proto=True)
            if wrong:
                raise Refused(400, wrong)
        document: Any = None
        if route.upload:
            document = _package(headers["Content-Type"], body)
        elif route.body:
            if not headers.get("Content-Type", "").startswith("application/json"):
                raise Refused(400, f"{route.name}: content type {headers.get('Content-Type')}")
            document = json.loads(body)
            if wrong := fault(document, route.body):
                raise Refused(400, f"{route.name}: {wrong}")
        elif body:
            raise Refused(400, f"{route.name}: takes no body")
        act = getattr(self, f"_{route.name}", None)
        if act is None:
            raise Refused(501, f"{route.name} is not part of this server")
        answer: dict[str, Any] = act(query, document, *matched.groups())
        return answer

    def _new(self, kind: dict[str, dict[str, Any]], key: str, values: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat()
        entry = {
            **{k: v for k, v in values.items() if v is not None},
            key: str(uuid.uuid4()),
            "created_at": now,
        }
        kind[entry[key]] = entry
        return entry

    def _listed(self, name: str, entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            assert predicate["operation"] in ("EQUALS", 1)
            entries = [e for e in entries if e.get(predicate["key"]) == predicate["stringValue"]]
        if not self.multi_user and name == "runs" and query.get("namespace"):
            raise Refused(400, "in single-user mode runs have no namespace")
        if self.multi_user and name in ("pipelines", "experiments", "recurringRuns", "runs"):
            if not query.get("namespace"):
                raise Refused(400, "a namespace is needed")
            entries = [e for e in entries if e.get("namespace") == query["namespace"]]
        start = int(query.get("page_token") or 0)
        stop = start + min(int(query.get("page_size") or 10), self.page_size_limit)
        page: dict[str, Any] = {name: entries[start:stop], "total_size": len(entries)}
        if stop < len(entries):
            page["next_page_token"] = str(stop)
        return page

    def _healthz_service_get_healthz(self, query: Any, body: Any) -> dict[str, Any]:
        return {"multi_user": self.multi_user}

    def _pipeline_service_list_pipelines(self, query: Any, body: Any) -> dict[str, Any]:
        return self._listed("pipelines", list(self.state.pipelines.values()), query)

    def _pipeline_service_create_pipeline(self, query: Any, body: Any) -> dict[str, Any]:
        names = {(p["name"], p.get("namespace")) for p in self.state.pipelines.values()}
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", body["name"]):
            raise Refused(400, f"pipeline name {body['name']}")
        if (body["name"], body.get("namespace")) in names:
            raise Refused(409, "the pipeline exists")
        return self._new(self.state.pipelines, "pipeline_id", body)

    def _pipeline_service_list_pipeline_versions(
        self, query: Any, body: Any, pipeline: str
    ) -> dict[str, Any]:
        mine = [v for v in self.state.versions.values() if v["pipeline_id"] == pipeline]
        return self._listed("pipeline_versions", mine, query)

    def _upload_pipeline_version(self, query: Any, spec: Any) -> dict[str, Any]:
        if query.get("pipelineid") not in self.state.pipelines:
            raise Refused(404, "no such pipeline")
        mine = [v for v in self.state.versions.values() if v["pipeline_id"] == query["pipelineid"]]
        if query["name"] in {v["display_name"] for v in mine}:
            raise Refused(409, "the version exists")
        return self._new(
            self.state.versions,
            "pipeline_version_id",
            {"display_name": query["name"], "name": query["name"], "pipeline_id": query["pipelineid"], "pipeline_spec": spec},
        )  # fmt: skip

    def _experiment_service_list_experiments(self, query: Any, body: Any) -> dict[str, Any]:
        return self._listed("experiments", list(self.state.experiments.values()), query)

    def _experiment_service_create_experiment(self, query: Any, body: Any) -> dict[str, Any]:
        return self._new(self.state.experiments, "experiment_id", body)

    def _check_start(self, body: dict[str, Any]) -> None:
        if body["experiment_id"] not in self.state.experiments:
            raise Refused(404, "no such experiment")
        reference = body["pipeline_version_reference"]
        version = self.state.versions.get(reference["pipeline_version_id"])
        if version is None or version["pipeline_id"] != reference["pipeline_id"]:
            raise Refused(404, "no such pipeline version")
        known = version["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        python = {"STRUCT": dict, "STRING": str, "NUMBER_INTEGER": int, "BOOLEAN": bool}
        for name, value in body["runtime_config"]["parameters"].items():
            if name not in known:
                raise Refused(400, f"the pipeline has no parameter {name}")
            if not isinstance(value, python[known[name]["parameterType"]]):
                raise Refused(400, f"parameter {name}: {value!r} is no {known[name]['parameterType']}")

    def _run_service_create_run(self, query: Any, body: Any) -> dict[str, Any]:
        self._check_start(body)
        return self._new(self.state.runs, "run_id", {**body, "state": "PENDING"})

    def _run_service_get_run(self, query: Any, body: Any, run: str) -> dict[str, Any]:
        if run not in self.state.runs:
            raise Refused(404, "no such run")
        entry = self.state.runs[run]
        self.on_look(entry)
        if wrong := fault(entry, "V2beta1Run"):
            raise AssertionError(wrong)
        return entry

    def _run_service_list_runs(self, query: Any, body: Any) -> dict[str, Any]:
        key, _, order = query.get("sort_by", "created_at").partition(" ")
        runs = sorted(self.state.runs.values(), key=lambda run: run[key], reverse=order == "desc")
        return self._listed("runs", runs, query)

    def _pipeline_service_get_pipeline_version(
        self, query: Any, body: Any, pipeline: str, version: str
    ) -> dict[str, Any]:
        return self.state.versions[version]

    def _recurring_run_service_list_recurring_runs(self, query: Any, body: Any) -> dict[str, Any]:
        return self._listed("recurringRuns", list(self.state.recurring.values()), query)

    def _recurring_run_service_create_recurring_run(self, query: Any, body: Any) -> dict[str, Any]:
        self._check_start(body)
        trigger = body["trigger"]
        assert len([v for v in trigger.values() if v]) == 1
        if cron := trigger.get("cron_schedule"):
            if len(cron["cron"].split()) != 6 and not cron["cron"].startswith("@"):
                raise Refused(400, "a cron line has six fields")
        else:
            trigger["periodic_schedule"]["interval_second"] = str(
                trigger["periodic_schedule"]["interval_second"]
            )
        namespace = self.state.experiments[body["experiment_id"]].get("namespace")
        body = {**body, "max_concurrency": str(body["max_concurrency"]), "namespace": namespace}
        return self._new(self.state.recurring, "recurring_run_id", body)

    def _entry(self, number: str) -> dict[str, Any]:
        if number not in self.state.recurring:
            raise Refused(404, "no such recurring run")
        return self.state.recurring[number]

    def _recurring_run_service_disable_recurring_run(self, query: Any, body: Any, run: str) -> dict[str, Any]:
        self._entry(run)["mode"] = "DISABLE"
        return {}

    def _recurring_run_service_enable_recurring_run(self, query: Any, body: Any, run: str) -> dict[str, Any]:
        self._entry(run)["mode"] = "ENABLE"
        return {}

    def _recurring_run_service_delete_recurring_run(self, query: Any, body: Any, run: str) -> dict[str, Any]:
        """Kubernetes deletes a schedule's workflows with it, unless the policy leaves them as orphans."""
        self._entry(run)
        policy = query.get("propagation_policy") or "DELETE_PROPAGATION_POLICY_UNSPECIFIED"
        allowed = kfp_server_api.V2beta1DeletePropagationPolicy.allowable_values
        if policy not in allowed:
            raise Refused(400, f"propagation_policy {policy} is not one of {allowed}")
        del self.state.recurring[run]
        if policy != "ORPHAN":
            for started in self.state.runs.values():
                if started.get("recurring_run_id") == run and started["state"] == "RUNNING":
                    started["state"] = "FAILED"
        return {}

    def start_scheduled(self, name: str) -> dict[str, Any]:
        """A run of the recurring run of this name, as KFP's controller starts one at its time."""
        (entry,) = [one for one in self.state.recurring.values() if one["display_name"] == name]
        copied = ("display_name", "experiment_id", "pipeline_version_reference", "runtime_config")
        values = {key: entry[key] for key in copied if key in entry}
        values |= {"recurring_run_id": entry["recurring_run_id"], "state": "RUNNING"}
        return self._new(self.state.runs, "run_id", values)


def _package(content_type: str, body: bytes) -> dict[str, Any]:
    """The pipeline spec of a multipart upload, valid by KFP's own protobuf schema."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    parts = list(message.iter_parts())  # type: ignore[attr-defined]
    names = [part.get_param("name", header="content-disposition") for part in parts]
    if names != ["uploadfile"]:
        raise Refused(400, f"form fields {names} instead of uploadfile")
    spec = next(yaml.safe_load_all(parts[0].get_payload(decode=True)))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    return dict(spec)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: KfpServer

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        owner = self.server_of
        try:
            status, answer = 200, owner.answer(self.command, self.path, self.headers, body)
        except Refused as error:
            status, answer = error.status, {"message": str(error)}
            if status not in (401, 403):
                owner.problems.append(f"{self.command} {self.path}: {error}")
        except Exception as error:
            status, answer = 500, {"message": repr(error)}
            owner.problems.append(f"{self.command} {self.path}: {error!r}")
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = do_PATCH = _do
