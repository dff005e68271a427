"""A real Ceph object store for tests: one monitor, one OSD in memory, one radosgw, with cephx on.

Of the stores at hand it alone enforces conditional writes and knows versioning.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
import uuid
from pathlib import Path
from typing import Self

import boto3  # type: ignore[import-untyped]

from tests.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, free_port

PROGRAMS = (
    "ceph",
    "ceph-authtool",
    "monmaptool",
    "ceph-mon",
    "ceph-osd",
    "radosgw",
    "radosgw-admin",
    "setpriv",
)
MEMORY_BYTES = 1 << 30
_PATIENCE_S = 180

CONFIG = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {memory}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon osd full ratio = 0.97
mon max pg per osd = 1000
ms bind msgr1 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
"""


def missing_programs() -> list[str]:
    """Programs of Ceph that are not installed; tests/install_servers.sh installs them."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Ceph:
    """One node; the bucket of the tests is there once it is started.

    Args:
        folder: of its state.
        address: of this machine, at which its S3 answers.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder, self.address, self.port = folder, address, free_port()
        self.endpoint = f"http://{address}:{self.port}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, cwd=self.folder, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "wb") as out:
            self._processes.append(
                subprocess.Popen(
                    # A test run that is killed takes its servers along.
                    ["setpriv", "--pdeathsig", "KILL", *command, "--conf", self._conf, "-f"],
                    stdout=out,
                    stderr=out,
                    cwd=self.folder,
                )
            )

    def start(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "osd").mkdir()
        self._conf = str(folder / "ceph.conf")
        fsid, mon_port = str(uuid.uuid4()), free_port()
        Path(self._conf).write_text(
            CONFIG.format(fsid=fsid, mon_port=mon_port, folder=folder, memory=MEMORY_BYTES)
        )
        everything = [part for name in ("mon", "osd", "mgr", "mds") for part in ("--cap", name, "allow *")]
        self._run(
            "ceph-authtool",
            "--create-keyring",
            "mon.keyring",
            "--gen-key",
            "-n",
            "mon.",
            "--cap",
            "mon",
            "allow *",
        )
        self._run(
            "ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "client.admin", *everything
        )
        self._run("ceph-authtool", "mon.keyring", "--import-keyring", "keyring")
        self._run(
            "monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "--fsid", fsid, "monmap"
        )
        self._run(
            "ceph-mon",
            "--conf",
            self._conf,
            "--mkfs",
            "-i",
            "a",
            "--monmap",
            "monmap",
            "--keyring",
            "mon.keyring",
        )
        self._daemon("ceph-mon", "-i", "a")
        ceph = ("ceph", "--conf", self._conf, "--connect-timeout", "60")
        osd_id = str(uuid.uuid4())
        self._run(*ceph, "osd", "new", osd_id)
        for name, caps in (
            ("osd.0", ("mon", "allow profile osd", "osd", "allow *")),
            ("client.rgw.a", ("mon", "allow rw", "osd", "allow rwx")),
        ):
            key = self._run(*ceph, "auth", "get-or-create", name, *caps)
            with open(folder / "keyring", "a", encoding="utf-8") as keyring:
                keyring.write(key)
        self._run("ceph-osd", "--conf", self._conf, "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._daemon("ceph-osd", "-i", "0")
        frontend = f"beast endpoint={self.address}:{self.port}"
        self.create_user(ACCESS_KEY, SECRET_KEY)
        self._daemon("radosgw", "-n", "client.rgw.a", "--rgw-frontends", frontend)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self.client().create_bucket(Bucket=BUCKET)
                return
            except Exception:
                assert time.monotonic() < deadline, (folder / "radosgw.out").read_text()[-2000:]
                time.sleep(0.3)

    def create_user(self, access_key: str, secret: str) -> None:
        """A user of the store; the tests' bucket belongs to the first."""
        self._run(
            *("radosgw-admin", "--conf", self._conf, "user", "create", "--uid", access_key.lower()),
            *("--display-name", "tests", "--access-key", access_key, "--secret", secret),
        )

    def client(self) -> object:
        """A plain client with the tests' credentials."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        self._processes = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
