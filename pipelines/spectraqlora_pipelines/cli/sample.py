"""The command sample."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from spectraqlora.errors import InputError
from spectraqlora.files import check_output
from spectraqlora.runtime.disk import ask, full

from spectraqlora_pipelines.cli.screen import console, line


def sample(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write model/ and data.jsonl.")],
) -> None:
    """Write the offline sample: a small pretrained Llama and a task.

    The model does not know the task yet. Pretraining takes one to two minutes
    the first time; later it comes from this user's cache.

    Example: spectraqlora sample my-sample
    """
    check_output(folder, "FOLDER", folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise InputError("FOLDER", folder, "a new or empty folder")
    from spectraqlora.sample.make import ensure_sample

    with console.status("pretraining the sample model, one to two minutes the first time"):
        cached = ensure_sample()
    ask(folder, sum(path.stat().st_size for path in cached.rglob("*")), "the sample")
    there = folder.exists()
    try:
        shutil.copytree(cached, folder, dirs_exist_ok=True)
    except BaseException as error:
        for path in list(folder.iterdir()) if there else [folder]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise full(error, [folder]) or error from None
    line(f"Wrote {folder / 'model'} and {folder / 'data.jsonl'}")
