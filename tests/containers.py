"""What tests with real containers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.runtime.images import image_reference
from spectraqlora_pipelines.local.containers import connect


def engine() -> Any:
    """The Docker engine; where there is none, the tests are skipped with the reason."""
    try:
        return connect()
    except InputError as error:
        pytest.skip(f"containers cannot run here: {error}")


def contained(
    client: Any, name: str, *command: str, mounts: dict[Path, str] | None = None, **options: Any
) -> tuple[int, str]:
    """Run a step image as strictly as a cluster does; (exit code, what it printed)."""
    container = client.containers.create(
        image_reference(name),
        list(command),
        **{
            "user": "1000680000:0",
            "read_only": True,
            "tmpfs": {"/tmp": ""},
            "network_mode": "none",
            "cap_drop": ["ALL"],
            "volumes": {str(path): {"bind": bind, "mode": "rw"} for path, bind in (mounts or {}).items()},
            **options,
        },
    )
    try:
        container.start()
        code = container.wait()["StatusCode"]
        return int(code), container.logs().decode()
    finally:
        container.remove(force=True, v=True)
