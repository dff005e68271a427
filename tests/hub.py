"""A hub for tests: the routes by which the hub's client names commits and fetches files, and `datasets` lists them."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from tests.http_server import Serving

Kind = Literal["models", "datasets"]
_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_TREE = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}/tree/(?P<revision>[^/]+)(?P<below>/.*)?")
_INFO = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}/revision/(?P<revision>[^/]+)")
_HEAD = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}")
_FILE = re.compile(rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Hub(Serving):
    """Repositories of folders: every `publish` is a commit on `main`.

    A name without owner leads to `legacy/name`, as the hub's oldest ones lead to their owners'.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[str, str], str] = {}
        self._commits: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.fetched: list[str] = []
        """`commit/file` of every download."""
        self.sent = 0
        """Bytes of files that were sent."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def publish(self, kind: Kind, name: str, folder: Path) -> str:
        """Make a folder's files the newest commit of a repository `owner/name`; returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        commit = hashlib.sha1(
            repr((self._heads.get((kind, name)), sorted(files.items()))).encode()
        ).hexdigest()
        self._commits[kind, name, commit] = files
        self._heads[kind, name] = commit
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point the hub's client here, and its cache at `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _files(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self._heads.get((kind, name), "") if revision == "main" else revision
        files = self._commits.get((kind, name, commit))
        return (commit, files) if files is not None else None

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        for form in (_TREE, _INFO, _HEAD, _FILE):
            route = form.fullmatch(path)
            if route and "/" not in route["id"]:
                return self._redirect(request, path.replace(f"/{route['id']}", f"/legacy/{route['id']}", 1))
            if route:
                break
        if route := _TREE.fullmatch(path):
            stored = self._files(route["kind"], route["id"], route["revision"])
            below = (route["below"] or "").strip("/")
            if stored:
                return self._json(
                    request, [self._entry(n, c) for n, c in stored[1].items() if n.startswith(below)]
                )
        elif route := _INFO.fullmatch(path) or _HEAD.fullmatch(path):
            stored = self._files(route["kind"], route["id"], route.groupdict().get("revision", "main"))
            if stored:
                siblings = [{"rfilename": name} for name in stored[1]]
                return self._json(
                    request, {"id": route["id"], "sha": stored[0], "siblings": siblings, "tags": []}
                )
        elif route := _FILE.fullmatch(path):
            kind = "datasets" if route["kind"] else "models"
            stored = self._files(kind, route["id"], route["revision"])
            if stored and route["name"] in stored[1]:
                commit, files = stored
                if body and "Range" not in request.headers:  # A range is a look, not the file.
                    self.fetched.append(f"{commit}/{route['name']}")
                self.sent += self._file(request, commit, files[route["name"]], body)
                return None
            if stored:
                return self._refuse(request, "EntryNotFound")
        kind = "datasets" if "/datasets/" in path else "models"
        known = route is not None and (kind, route["id"]) in self._heads
        return self._refuse(request, "RevisionNotFound" if known else "RepoNotFound")

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    @staticmethod
    def _json(request: BaseHTTPRequestHandler, document: object) -> None:
        content = json.dumps(document).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    @staticmethod
    def _file(request: BaseHTTPRequestHandler, commit: str, content: bytes, body: bool) -> int:
        """Send a file, or the range of it that is asked for; returns the bytes sent."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        request.send_response(206 if asked else 200)
        if asked:
            request.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(content)}")
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if body:
            request.wfile.write(part)
        return len(part) if body else 0

    @staticmethod
    def _redirect(request: BaseHTTPRequestHandler, path: str) -> None:
        request.send_response(307)
        request.send_header("Location", path)
        request.send_header("Content-Length", "0")
        request.end_headers()

    @staticmethod
    def _refuse(request: BaseHTTPRequestHandler, code: str) -> None:
        request.send_response(404)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()
