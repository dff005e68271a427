"""Metrics sent while a step works, from a thread of its own: MLflow's pauses never hold the work up."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import Any, Self

from spectraqlora.runtime.console import say, warn
from spectraqlora.tracking.runs import Tracker
from spectraqlora.tracking.server import ServerAway, explain_errors

SEND_SECONDS = 5.0
SAMPLE_SECONDS = 10.0
FAILED_SECONDS = 5.0


class LiveMetrics:
    """Collects points, sends them in batches and keeps what could not be sent until the server is back.

    System metrics (CPU, memory, disk, network, GPU where there is one) are sampled next to them by MLflow's
    own monitors.

    Args:
        tracker: of the pipeline run.
        run_id: where the points belong.
        offset: added to every step.
    """

    def __init__(self, tracker: Tracker, run_id: str, offset: int = 0) -> None:
        self._tracker, self._run, self._offset = tracker, run_id, offset
        self._waiting: list[Any] = []
        self._known: dict[str, set[int]] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="live-metrics", daemon=True)
        self.away_since: float | None = None

    def __call__(self, name: str, step: int, value: float) -> None:
        """Record a point; returns at once."""
        from mlflow.entities import Metric

        if math.isfinite(value):
            with self._lock:
                self._waiting.append(Metric(name, value, int(time.time() * 1000), step + self._offset))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Send the rest; a failed or stopped step waits for a moment only, since somebody may wait for its end."""
        self._stop.set()
        self._thread.join(None if kind is None else FAILED_SECONDS)
        if kind is None:
            self._tracker.retry_while_away(self._send, f"the end of the curves ({len(self._waiting)} points)")
        elif self.away_since is None and not self._thread.is_alive():
            self._try()

    def _send(self) -> None:
        with self._lock:
            points = list(self._waiting)
        for name in {p.key for p in points} - self._known.keys():
            self._known[name] = self._tracker.known_steps(self._run, name)
        fresh = [p for p in points if p.step not in self._known[p.key]]
        self._tracker.log_points(self._run, fresh)
        for point in points:
            self._known[point.key].add(point.step)
        with self._lock:
            del self._waiting[: len(points)]

    def _try(self) -> None:
        try:
            self._send()
        except ServerAway as error:
            if self.away_since is None:
                self.away_since = time.monotonic()
                warn(f"MLflow does not answer ({error.why}); the metrics wait, the work continues")
            return
        if self.away_since is not None:
            say(f"MLflow is back after {time.monotonic() - self.away_since:.0f} s; metrics are sent")
            self.away_since = None

    def _work(self) -> None:
        monitor, started = self._monitor()
        sampled = -SAMPLE_SECONDS
        while not self._stop.wait(min(SEND_SECONDS, SAMPLE_SECONDS)):
            if monitor and time.monotonic() - sampled >= SAMPLE_SECONDS:
                sampled = time.monotonic()
                self._sample(monitor, int((time.time() - started) / SAMPLE_SECONDS))
            self._try()
        if monitor:
            self._sample(monitor, int((time.time() - started) / SAMPLE_SECONDS) + 1)

    def _monitor(self) -> tuple[Any, float]:
        """MLflow's monitor, and when the run started: its samples are counted from there."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        started = time.time()
        with contextlib.suppress(ServerAway), explain_errors(self._tracker.settings):
            started = self._tracker.client.get_run(self._run).info.start_time / 1000
        return SystemMetricsMonitor(self._run, tracking_uri=self._tracker.settings.uri), started

    def _sample(self, monitor: Any, step: int) -> None:
        from mlflow.entities import Metric

        monitor.collect_metrics()
        now = int(time.time() * 1000)
        samples = [
            Metric(f"system/{name}", float(value), now, step)
            for name, value in monitor.aggregate_metrics().items()
        ]
        for part in monitor.monitors:
            part.clear_metrics()
        with self._lock:
            self._waiting += samples
