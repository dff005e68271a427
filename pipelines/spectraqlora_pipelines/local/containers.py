"""Steps of a local run in containers: what they see of this machine, and when one counts as done.

kfp.local starts the containers through one function, which removes a container before it asks for the exit code
and takes the code that is then missing for 0. `replace_kfps` puts the one of this module in its place.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, Mount
from requests.exceptions import RequestException
from spectraqlora.errors import InputError
from spectraqlora.places import Place, file_place
from spectraqlora.runtime import run_key
from spectraqlora.runtime.images import IMAGE_USER, image_reference, images
from spectraqlora.runtime.threads import CPUS, threads_per_process
from spectraqlora.settings import Settings
from spectraqlora.signing import SIGNING_KEY, VERIFYING_KEY

from spectraqlora_pipelines.cluster.credentials import for_step

DEFAULT_NETWORK = "host" if sys.platform == "linux" else "bridge"
WORKDIR_LABEL = "spectraqlora.workdir"
GRACE_S = 30
"""Training writes a checkpoint after its current step, then ends."""
_PASSED_PREFIXES = ("AWS_", "MLFLOW_", "HF_")
_PASSED_NAMES = (
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "OMP_NUM_THREADS", run_key.VARIABLE, SIGNING_KEY, VERIFYING_KEY,
)  # fmt: skip


@dataclass(frozen=True)
class HostAccess:
    """What the containers of a run share with this machine.

    Args:
        workdir: of the run, mounted at its own path, as everything is.
        readable: files and folders mounted read-only.
        writable: further folders mounted to be written.
        network: a Docker network; `host` reaches servers on this machine at the addresses they have here.
        user: user id of the steps: the images' own where root starts the run, else that of who starts it.
    """

    workdir: Path
    readable: Sequence[Path] = ()
    writable: Sequence[Path] = ()
    network: str = "host"
    user: int = field(default_factory=lambda: os.getuid() or IMAGE_USER)

    @property
    def scratch(self) -> Path:
        """Where steps put temporary files: on disk, for a container's /tmp is in memory."""
        return self.workdir / "scratch"

    @property
    def cache(self) -> Path:
        """Copies of remote models: this user's own cache; another user's steps keep theirs in the workdir."""
        if self.user != os.getuid():
            return self.workdir / "cache"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

    @property
    def hub(self) -> Path:
        """The model hub's cache."""
        own = os.environ.get("HF_HOME") if self.user == os.getuid() else None
        return Path(own) if own else self.cache / "huggingface"

    def environment(self, variables: Mapping[str, str], step: str) -> dict[str, str]:
        """Variables for a step: of object storage, MLflow, hub and keys what it needs; cores; and where to write."""
        passed = {
            name: value
            for name, value in for_step(variables, step).items()
            if name.startswith(_PASSED_PREFIXES) or name in _PASSED_NAMES
        }
        writable = {"TMPDIR": self.scratch, "XDG_CACHE_HOME": self.cache, "HF_HOME": self.hub}
        # A container sees no steps but its own: this process counts for it among the machine's live steps.
        cores = {CPUS: str(threads_per_process())}
        return cores | passed | {name: str(folder) for name, folder in writable.items()}

    def mounts(self, variables: Mapping[str, str], step: str) -> list[Mount]:
        """Bind mounts, each at the path that it has here; a file that a variable of the step names comes along."""
        writable = [self.workdir, self.cache / "spectraqlora", self.hub, *self.writable]
        named = [Path(value) for value in self.environment(variables, step).values() if value.startswith("/")]
        readable = [*self.readable, *(path for path in named if path.is_file())]
        behind_links = {
            link.resolve().parent
            for folder in self.readable
            if folder.is_dir()
            for link in folder.rglob("*")
            if link.is_symlink() and link.exists()
        }
        wanted = {path: True for path in [*readable, *sorted(behind_links)]} | dict.fromkeys(writable, False)
        return [
            Mount(str(path), str(path), type="bind", read_only=read_only)
            for path, read_only in wanted.items()
            if next((wanted[above] for above in path.parents if above in wanted), None) is not read_only
        ]

    def prepare(self) -> None:
        """Make the folders that steps write to, and give them to the steps' user where that is another.

        Raises:
            InputError: that user may not read an input.
        """
        if self.user != os.getuid():
            for given in self.readable:
                for path in (given, *given.rglob("*")):
                    if path.exists() and not _readable_by_image_user(path):
                        raise InputError(
                            "file", path, f"a file that user {self.user} may read: chmod -R a+rX {given}"
                        )
        created = [folder for folder in self.writable if not folder.exists()]
        for folder in (
            *created,
            self.workdir / "artifacts",
            self.scratch,
            self.cache / "spectraqlora",
            self.hub,
        ):
            folder.mkdir(parents=True, exist_ok=True)
        if self.user != os.getuid():
            for path in (*created, self.workdir, *self.workdir.rglob("*")):
                os.chown(path, self.user, 0, follow_symlinks=False)


def _readable_by_image_user(path: Path) -> bool:
    status = path.stat()
    bits = 0o5 if path.is_dir() else 0o4
    return status.st_mode & bits == bits or (status.st_gid == 0 and (status.st_mode >> 3) & bits == bits)


def connect() -> docker.DockerClient:
    """The Docker engine.

    Raises:
        InputError: none answers.
    """
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            "--runner", "docker", f"a Docker engine that answers, or use subprocess ({reason})"
        ) from None
    return client


def check_images(network: str) -> None:
    """Refuse the docker runner where the engine, a step image or the network is missing."""
    client = connect()
    for name in images():
        try:
            client.images.get(image_reference(name))
        except ImageNotFound:
            raise InputError(
                "--runner", "docker", f"the image {image_reference(name)}; `make images` builds it"
            ) from None
    known = [str(entry.name) for entry in client.networks.list()]
    if network not in known:
        raise InputError("--network", network, f"a Docker network, one of {', '.join(sorted(known))}")


def remove_leftovers(workdir: Path) -> None:
    """End containers of an earlier run in this workdir whose command line was killed."""
    client = connect()
    for container in client.containers.list(all=True, filters={"label": f"{WORKDIR_LABEL}={workdir}"}):
        with contextlib.suppress(NotFound):
            container.remove(force=True)


def run_container(
    client: docker.DockerClient,
    name: str,
    command: Sequence[str],
    access: HostAccess,
    environment: Mapping[str, str],
) -> int:
    """Run a step to its end, print what it prints; its exit code, or 1 where it left its outputs behind undone."""
    information = client.info()
    options: dict[str, Any] = {}
    if "nvidia" in information.get("Runtimes", {}):
        options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    security = ["no-new-privileges"]
    if any("selinux" in option for option in information.get("SecurityOptions") or []):
        security.append("label=disable")  # Without it the mounts, which keep their own labels, stay closed.
    if access.network != "host":
        options["extra_hosts"] = {"host.docker.internal": "host-gateway"}
    step = step_of(command)
    container = client.containers.create(
        name,
        list(command),
        environment={**environment, **access.environment(os.environ, step)},
        mounts=access.mounts(os.environ, step),
        network=access.network,
        user=f"{access.user}:0",
        labels={WORKDIR_LABEL: str(access.workdir)},
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=security,
        shm_size="1g",
        **options,
    )
    try:
        container.start()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for chunk in container.logs(stream=True, follow=True):
            print(decoder.decode(chunk), end="", flush=True)
        code = int(container.wait()["StatusCode"])
        container.reload()
        if container.attrs["State"].get("OOMKilled"):
            print("\nThe step was ended for want of memory.")
    except BaseException:
        _end(container)
        raise
    finally:
        with contextlib.suppress(NotFound):
            container.remove(force=True, v=True)
    if code == 0:
        missing = missing_outputs(command)
        if missing:
            print(f"\nThe step ended well, but did not write {', '.join(map(str, missing))}")
            return 1
    return code


def _end(container: Any) -> None:
    """Let the step end by itself for a while; a shell that waits for it does not pass signals on."""
    with contextlib.suppress(DockerException, RequestException):
        container.exec_run(["sh", "-c", "kill -TERM -1"])
        container.wait(timeout=GRACE_S)


def step_of(command: Sequence[str]) -> str:
    """The step that KFP's command line runs."""
    arguments = list(command)
    return arguments[arguments.index("--function_to_execute") + 1].replace("_", "-")


def missing_outputs(command: Sequence[str]) -> list[Path]:
    """Of the outputs that KFP's command line names, those that are not there or empty."""
    arguments = list(command)
    if "--executor_input" not in arguments:
        return []
    given = json.loads(arguments[arguments.index("--executor_input") + 1])["outputs"]
    expected = [Path(given["outputFile"])]
    for entry in given.get("artifacts", {}).values():
        expected += [Path(artifact["uri"]) for artifact in entry["artifacts"]]
    return [path for path in expected if not (path.is_file() or (path.is_dir() and any(path.iterdir())))]


@contextlib.contextmanager
def replace_kfps(access: HostAccess) -> Iterator[None]:
    """Let kfp.local run its containers with `run_container`."""
    from kfp.local import docker_task_handler

    def run(client: docker.DockerClient, image: str, command: Sequence[str], **given: Any) -> int:
        return run_container(client, image, command, access, given.get("environment", {}))

    remove_leftovers(access.workdir)
    access.prepare()
    kfps = docker_task_handler.run_docker_container
    docker_task_handler.run_docker_container = run
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = kfps
        shutil.rmtree(access.scratch, ignore_errors=True)


def host_access(settings: Settings, workdir: Path, inputs: Sequence[Place], network: str) -> HostAccess:
    """What the steps of a run need of this machine: inputs, checkpoints and MLflow's SQLite where they are local.

    Args:
        settings: of the run.
        workdir: absolute.
        inputs: base model and data set.
        network: a Docker network.
    """
    files = [file_place(name, "file") for name in (settings.snr.table, settings.promote.guard_data) if name]
    writable = [settings.checkpoint.folder] if settings.checkpoint.folder else []
    if settings.tracking.uri.startswith("sqlite:///"):
        writable.append(os.path.dirname(settings.tracking.uri.removeprefix("sqlite:///")))
    return HostAccess(
        workdir,
        readable=[place.path for place in (*inputs, *files) if place.kind == "path"],
        writable=[Path(folder).absolute() for folder in writable],
        network=network,
    )
