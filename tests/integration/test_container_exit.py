"""A step container that fails fails the run, every time; one that is stopped leaves nothing behind."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local
from spectraqlora.runtime.images import image_reference
from spectraqlora_pipelines.local.containers import WORKDIR_LABEL, HostAccess, replace_kfps

from tests.containers import engine
from tests.integration.test_dag import CLI, spectraqlora

pytestmark = pytest.mark.e2e
TIMES = 50


@dsl.component(base_image=image_reference("light"), install_kfp_package=False)
def fails(number: int, left: dsl.Output[dsl.Artifact]):  # type: ignore[no-untyped-def]
    """Write the output, then end with an error: only the exit code tells."""
    import os
    import sys

    os.makedirs(left.path)
    with open(os.path.join(left.path, "manifest.json"), "w") as stream:
        stream.write("{}")
    sys.exit(number % 3 + 1)


@dsl.component(base_image=image_reference("light"), install_kfp_package=False)
def forgets(left: dsl.Output[dsl.Artifact]):  # type: ignore[no-untyped-def]
    """End well without an output."""


@dsl.component(base_image=image_reference("light"), install_kfp_package=False)
def writes(left: dsl.Output[dsl.Artifact]):  # type: ignore[no-untyped-def]
    """Do as it should."""
    import os

    os.makedirs(left.path)
    with open(os.path.join(left.path, "manifest.json"), "w") as stream:
        stream.write("{}")


@pytest.fixture(scope="module")
def docker() -> Any:
    return engine()


@pytest.fixture
def access(docker: Any, tmp_path: Path) -> HostAccess:
    local.init(local.DockerRunner(), pipeline_root=str(tmp_path / "artifacts"))
    return HostAccess(tmp_path, network="none")


def test_a_step_that_fails_fails_the_run_fifty_times_out_of_fifty(access: HostAccess) -> None:
    failed = 0
    with replace_kfps(access):
        for number in range(TIMES):
            try:
                fails(number=number)
            except RuntimeError as error:
                failed += "FAILURE" in str(error)
    assert failed == TIMES


def test_a_step_without_its_output_fails_and_one_with_it_does_not(
    access: HostAccess, capsys: pytest.CaptureFixture[str]
) -> None:
    with replace_kfps(access):
        with pytest.raises(RuntimeError):
            forgets()
        assert "did not write" in capsys.readouterr().out
        done = writes()
    assert (Path(done.outputs["left"].path) / "manifest.json").exists()


def test_an_unknown_network_is_refused(docker: Any, tmp_path: Path) -> None:
    refused = spectraqlora(
        "run", "--runner", "docker", "--network", "none-such", "--workdir", str(tmp_path / "w")
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --network: 'none-such': expected a Docker network, one of ")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_a_stopped_run_leaves_no_container_and_goes_on_where_it_was(
    number: signal.Signals, docker: Any, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """After SIGKILL it is the next run that removes what the killed one could not."""
    work = tmp_path / "w"
    arguments = [
        "run", "--runner", "docker", "--base-model", str(tiny_model), "--data", str(tiny_rows),
        "--workdir", str(work), "--methods", "hybrid", "--max-steps", "4", "--set", "evaluate.accuracy_rows=0",
    ]  # fmt: skip

    def running() -> list[Any]:
        found: list[Any] = docker.containers.list(filters={"label": f"{WORKDIR_LABEL}={work}"})
        return found

    process = subprocess.Popen([*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "select-layers" in line:
            break
    while process.poll() is None and not running():
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=90)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), said
    if number == signal.SIGTERM:
        assert not running()
    quantized = {path: path.stat().st_mtime_ns for path in work.rglob("four_bit/manifest.json")}
    assert quantized
    done = spectraqlora(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in work.rglob("four_bit/manifest.json")} == quantized
    assert not running()
