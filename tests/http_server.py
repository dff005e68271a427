"""What the HTTP servers of the tests have in common."""

from __future__ import annotations

import threading
from http.server import HTTPServer
from typing import Self


class Serving:
    """Serves from a thread of its own, as a context manager; a subclass makes `_server`."""

    _server: HTTPServer

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
