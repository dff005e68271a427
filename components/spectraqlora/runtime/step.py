"""What surrounds a step's work: its threads and memory, its end with the launcher, its errors in one line, its output folders.

An `InputError` ends a step with its one line and exit code 2, or 75 where a service does not answer; every other error
keeps its traceback.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from spectraqlora.errors import InputError, Stopped
from spectraqlora.files import write_text
from spectraqlora.runtime.allocator import keep_tensors_out_of_heaps
from spectraqlora.runtime.console import fail, say
from spectraqlora.runtime.disk import full
from spectraqlora.runtime.logs import silence_libraries
from spectraqlora.runtime.threads import bound_threads

P = ParamSpec("P")
R = TypeVar("R")
LAUNCHER_PID = "SPECTRAQLORA_LAUNCHER_PID"
"""Environment variable that names the local process without which a step has nobody to work for."""
MADE_FROM = "made_from.json"
"""File of every artifact in a bucket: the addresses of what its step read, by which later runs' needs are followed."""
_made: list[Any] = []
"""The artifacts that this process's step writes."""


def _end_with_launcher() -> None:
    """End this process soon after the launcher's end, however that came."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return

    def watch() -> None:
        while os.path.exists(f"/proc/{launcher}"):
            time.sleep(1)
        os._exit(1)

    if os.path.exists("/proc"):
        threading.Thread(target=watch, daemon=True).start()


def step(function: Callable[P, R]) -> Callable[P, R]:
    """A step's function with its threads bounded, its libraries silent, and its errors turned into exit codes.

    Exits after one line with 2 for an `InputError` and for a full disk, and with 75 for a `NoAnswer`; with a signal's
    own code where the work was stopped by one. Every other error passes with its traceback.
    """
    integers = {name for name, kind in function.__annotations__.items() if kind in (int, "int")}

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        # A KFP backend may hand whole numbers over as floats; a section's fields see to that themselves.
        for name in integers & kwargs.keys():
            kwargs[name] = int(kwargs[name])  # type: ignore[call-overload]
        silence_libraries()
        bound_threads()
        keep_tensors_out_of_heaps()
        _end_with_launcher()
        _made.clear()
        try:
            result = function(*args, **kwargs)
            _write_origin(kwargs.values())
            return result
        except InputError as error:
            fail(f"{error.prefix}{error}")
            sys.exit(error.exit_code)
        except Stopped as stop:
            say(str(stop))
            sys.exit(stop.exit_code)
        except Exception as error:
            no_room = full(error, _written(kwargs))
            if no_room is None:
                raise
            fail(str(no_room))
            sys.exit(2)

    return guarded


def _written(arguments: dict[str, Any]) -> list[Path]:
    """Where a step's artifacts are, those that it reads among them: all are of one pipeline."""
    return [Path(value.path) for value in arguments.values() if hasattr(value, "path")]


def output_folder(artifact: Any) -> Path:
    """The artifact's folder, made empty: a retry never sees what a failed attempt left behind."""
    folder = Path(artifact.path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _made.append(artifact)
    return folder


def _write_origin(given: Iterable[Any]) -> None:
    """Leave in each artifact the addresses of what it was made from; on this machine `outputs.json` says more."""
    artifacts = {str(each.uri): each for each in given if "://" in str(getattr(each, "uri", ""))}
    made = {address for address, each in artifacts.items() if any(each is own for own in _made)}
    read = sorted(artifacts.keys() - made)
    for address in made:
        write_text(Path(artifacts[address].path) / MADE_FROM, json.dumps({"made_from": read}, indent=1))
