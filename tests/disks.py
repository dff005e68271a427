"""File systems of a test's own: few bytes, gone when the command that sees them ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
ON_A_SMALL_DISK = 'mkdir -p "$1" && mount -t tmpfs -o size="$2" none "$1" && shift 2 && exec "$@"'


def on_a_small_disk(folder: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds an empty file system of so many bytes at a folder; gone when it ends."""
    can = shutil.which("unshare") and subprocess.run(
        [*MOUNT, ON_A_SMALL_DISK, "sh", str(folder), "64k", "true"], capture_output=True, check=False
    )
    if not can or can.returncode:
        pytest.skip("this user may not mount a file system of its own")
    return subprocess.run(
        [*MOUNT, ON_A_SMALL_DISK, "sh", str(folder), size, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
