"""Running the compiled DAG with kfp.local: logs to a file, progress on screen, results in the workdir."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, MergedModel, PreparedData, QuantizedModel, write_text
from spectraqlora.errors import InputError
from spectraqlora.progress import PREFIX
from spectraqlora.settings import Settings
from spectraqlora.step import ERROR_PREFIX, LAUNCHER_PID

if TYPE_CHECKING:
    from spectraqlora_pipelines.step_containers import Surroundings

_GRACE_S = 30
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TASK = re.compile(r"(?:Executing task|Task) '?([a-z0-9-]+)'?")


@contextlib.contextmanager
def _steps_end_with_us() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the running step first; a step whose command line is killed ends itself."""

    def stop(number: int, frame: object) -> None:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        # Training ends after its current step and a checkpoint, everything else at once.
        _, alive = psutil.wait_procs(children, timeout=_GRACE_S)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        raise KeyboardInterrupt

    os.environ[LAUNCHER_PID] = str(os.getpid())
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        del os.environ[LAUNCHER_PID]


class StepFailed(Exception):
    """A step ended with an error that is not the user's input."""


class _Lines(io.TextIOBase):
    """Splits what kfp.local prints into lines: each goes to the log file and to a listener."""

    def __init__(self, log: Path, listen: Callable[[str], None]) -> None:
        self._file = open(log, "a", encoding="utf-8")  # noqa: SIM115 - closed with the stream
        self._listen, self._rest = listen, ""
        self.tail: list[str] = []
        self.refusal: str | None = None
        """What a step said of its input; other steps may have gone on and written much after it."""

    def write(self, text: str) -> int:
        # On a full disk the log is cut short; what counts is what the step says.
        with contextlib.suppress(OSError):
            self._file.write(_ANSI.sub("", text))
            self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            clean = _ANSI.sub("", line).strip()
            if clean:
                self.tail = [*self.tail[-60:], clean]
                if clean.startswith(ERROR_PREFIX):
                    self.refusal = clean.removeprefix(ERROR_PREFIX)
                self._listen(clean)
        return len(text)

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        super().close()


@contextlib.contextmanager
def _captured(lines: _Lines) -> Iterator[None]:
    handler_streams = []
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler_streams.append((handler, handler.setStream(lines)))
    try:
        with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
            yield
    finally:
        for handler, stream in handler_streams:
            if stream is not None:
                handler.setStream(stream)


def run_locally(
    pipeline: Any,
    arguments: dict[str, Any],
    workdir: Path,
    containers: Surroundings | None,
    on_task: Callable[[str], None],
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Run a DAG; finished steps of an earlier run with the same arguments are taken from kfp's cache.

    Args:
        pipeline: the DAG.
        arguments: of the pipeline.
        workdir: where everything of the run is kept.
        containers: what step containers share with this machine; None runs steps as processes.
        on_task: told every step's name when it starts.
        on_progress: told done, total and label of what a step counts.

    Raises:
        InputError: a step refused its input.
        StepFailed: a step failed otherwise; the message ends with where to read on.
    """
    from kfp import local

    from spectraqlora_pipelines.step_containers import replace_kfps

    log = workdir / "run.log"
    chosen = local.DockerRunner() if containers else local.SubprocessRunner(use_venv=False)
    local.init(
        chosen,
        pipeline_root=str(workdir / "artifacts"),
        enable_caching=True,
        cache_root=str(workdir / "artifacts" / ".kfp_cache"),
    )

    def listen(line: str) -> None:
        if line.startswith(PREFIX):
            match = re.match(rf"{PREFIX} (\d+)/(\d+) (.*)", line)
            if match:
                on_progress(int(match[1]), int(match[2]), match[3])
        elif "Executing task" in line or "Cache hit" in line:
            found = _TASK.search(line)
            if found:
                on_task(found[1])

    lines = _Lines(log, listen)
    try:
        in_containers = replace_kfps(containers) if containers else contextlib.nullcontext()
        with _steps_end_with_us(), in_containers, _captured(lines), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline(**arguments)
    except InputError:
        raise
    except Exception as error:
        if lines.refusal is not None:
            raise _Relayed(lines.refusal) from None
        raise StepFailed(f"{_ANSI.sub('', str(error))} Last line: {_last(lines.tail)} Read {log}") from error
    finally:
        lines.close()


class _Relayed(InputError):
    """An `InputError` that a step printed; its line is passed on as it is."""

    def __init__(self, line: str) -> None:
        Exception.__init__(self, line)


def _last(tail: list[str]) -> str:
    telling = [line for line in tail if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    return repr((telling or tail or [""])[-1])


def collect(settings: Settings, workdir: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gather the steps' artifacts into `summary.json`, `merged/`, `adapter/` and `report.html`.

    Args:
        settings: of the run.
        workdir: of the run.
        more: what the summary says beside.

    Raises:
        InputError: the workdir holds no finished run.
    """
    found = {
        "leaderboard": _newest(workdir, "leaderboard/leaderboard.json"),
        "winner": _newest(workdir, "winner/evaluation.json"),
        "exported": _newest(workdir, "exported/manifest.json"),
        "registered": _newest(workdir, "registered/registered.json"),
        "decision": _newest(workdir, "decision/decision.json"),
        "quantized": _newest(workdir, "quantized/manifest.json"),
        "data": _newest(workdir, "data/manifest.json"),
    }
    board = json.loads((found["leaderboard"] / "leaderboard.json").read_text())
    evaluations = [Evaluation.read(found["leaderboard"] / method) for method in board["order"]]
    merged = MergedModel.read(found["exported"])
    quantized, data = QuantizedModel.read(found["quantized"]), PreparedData.read(found["data"])
    registered = json.loads((found["registered"] / "registered.json").read_text())
    first = evaluations[0]
    for name in ("merged", "adapter"):
        _replace_tree(found["exported"] / name, workdir / name)
    summary: dict[str, Any] = {
        "version": __version__,
        "base": {
            "model": quantized.source,
            "digest": quantized.base_digest,
            "eval_loss": first.base_eval_loss,
            "perplexity": first.base_perplexity,
            "accuracy": first.base_accuracy,
            "parameters": quantized.parameters,
            "four_bit_share": quantized.four_bit_parameters / quantized.parameters,
        },
        "data": {
            "source": data.source,
            "digest": data.digest,
            "train_rows": data.train_rows,
            "eval_rows": data.eval_rows,
            "dropped_long": data.dropped_long,
            "dropped_empty": data.dropped_empty,
        },
        "methods": {e.method: _method_entry(e) for e in evaluations},
        "winner": board["winner"],
        "merged_model": str(workdir / "merged"),
        "adapter": str(workdir / "adapter"),
        "merged_into": merged.merged_into,
        "merged_eval_loss": merged.verified_eval_loss,
        "published": merged.published,
        "registered": registered,
        "promotion": json.loads((found["decision"] / "decision.json").read_text()),
    }
    summary |= more or {}
    write_text(workdir / "summary.json", json.dumps(summary, indent=1))
    report(settings, workdir)
    return summary


def collect_retraining(settings: Settings, workdir: Path) -> dict[str, Any]:
    """What a retraining came to: `summary.json` with what changed and, where something did, what came of it.

    Raises:
        InputError: the workdir holds no finished retraining.
    """
    found = _newest(workdir, "changes/changes.json")
    changes = json.loads((found / "changes.json").read_text())
    if changes["changed"]:
        return collect(settings, workdir, {"changes": changes})
    summary = {"version": __version__, "changes": changes}
    write_text(workdir / "summary.json", json.dumps(summary, indent=1))
    return summary


def report(settings: Settings, workdir: Path) -> Path:
    """Write `report.html` from the run's artifacts."""
    from spectraqlora.compare.report import write_report
    from spectraqlora.snr.table import read_table

    leaderboard = _newest(workdir, "leaderboard/leaderboard.json")
    board = json.loads((leaderboard / "leaderboard.json").read_text())
    evaluations = [Evaluation.read(leaderboard / method) for method in board["order"]]
    path = workdir / "report.html"
    digests = {
        "base model": evaluations[0].base_digest,
        "data": evaluations[0].data_digest,
        "spectraqlora": __version__,
    }
    write_report(
        path,
        evaluations,
        read_table(_newest(workdir, "table/snr.parquet")),
        settings.model_dump(mode="json"),
        digests,
        board["winner"],
        MergedModel.read(_newest(workdir, "exported/manifest.json")),
    )
    return path


def _method_entry(evaluation: Evaluation) -> dict[str, Any]:
    entry = evaluation.model_dump(
        mode="json",
        include={
            "eval_loss",
            "eval_loss_stderr",
            "perplexity",
            "accuracy",
            "trainable_parameters",
            "train_seconds",
            "train_tokens_per_second",
            "peak_memory_bytes",
        },
    )
    entry["train_tokens"] = sum(r.training.train_tokens for r in evaluation.rounds)
    entry["rounds"] = [
        {
            "round": r.round,
            "eval_loss": r.eval_loss,
            "trained": r.trained,
            "changes": r.changes,
            "active": len(r.rank_map.active()),
        }
        for r in evaluation.rounds
    ]
    return entry


def _newest(workdir: Path, pattern: str) -> Path:
    found = sorted((workdir / "artifacts").glob(f"*/*/*/{pattern}"), key=lambda p: p.stat().st_mtime)
    if not found:
        found = sorted((workdir / "artifacts").rglob(pattern), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError("workdir", workdir, f"a finished run; {pattern} is not there")
    return found[-1].parent


def _replace_tree(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
