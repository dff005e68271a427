"""Work in a process of its own that ends, as by the kernel's hand, after its n-th request to MLflow."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import wraps
from typing import Any

WAIT_SECONDS = 300


def run_until_request(work: Callable[[], Any], last: int | None = None) -> bool:
    """Run `work` in a forked process that SIGKILL ends after request `last`; whether it came to its end.

    A request is a call of the tracking store, of the registry's store, or of the artifacts' store: what MLflow's
    client sends to a server that has one, and does by itself with a database file.

    Args:
        work: what is done; its result is not seen.
        last: number of the last request, from 1; None lets it finish.
    """
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, last))
    process.start()
    process.join(WAIT_SECONDS)
    code = process.exitcode
    assert code in (0, -signal.SIGKILL), f"the process ended with {code}"
    return code == 0


def _work(work: Callable[[], Any], last: int | None) -> None:
    if last is not None:
        _kill_after(last)
    work()


def _kill_after(last: int) -> None:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.model_registry.abstract_store import AbstractStore as AbstractRegistry
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.abstract_store import AbstractStore as AbstractTracking
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    done, within = 0, 0

    def counted(request: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(request)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal done, within
            within += 1
            try:
                return request(*arguments, **named)
            finally:
                within -= 1
                done += within == 0  # a store's own calls of itself belong to the request
                if done == last and not within:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    for store, interface in (
        (Tracking, AbstractTracking),
        (Registry, AbstractRegistry),
        (LocalArtifactRepository, ArtifactRepository),
    ):
        for name, method in vars(interface).items():
            if callable(method) and not name.startswith("_"):
                setattr(store, name, counted(getattr(store, name)))
