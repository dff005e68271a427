"""The step images as a cluster runs them: read-only root, any user, no capabilities, no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from spectraqlora import __version__
from spectraqlora.artifacts import RankMap, TrainingLog
from spectraqlora.runtime.images import IMAGE_USER, image_reference, images

from tests.containers import contained, engine

pytestmark = pytest.mark.e2e
LIMIT_BYTES = {"light": 650e6, "train": 2.0e9}
MLFLOW = "mlflow"
"""The image of MLflow's server, which runs no step."""
IMPORTS = """
import importlib.util, os, sys
from spectraqlora.runtime.command_line import steps
for step in steps():
    package = "spectraqlora.steps." + step.replace("-", "_")
    folder = importlib.import_module(package).__path__[0]
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and name != "component.py":
            importlib.import_module(f"{package}.{name[:-3]}")
print("torch" in sys.modules or importlib.util.find_spec("torch") is not None)
"""


@pytest.fixture(scope="module")
def docker() -> Any:
    return engine()


@pytest.mark.parametrize("name", [*images(), MLFLOW])
def test_labels_user_and_size(docker: Any, name: str) -> None:
    found = docker.images.get(image_reference(name))
    config = found.attrs["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}(-modified)?", labels["org.opencontainers.image.revision"])
    assert f"SPECTRAQLORA_REVISION={labels['org.opencontainers.image.revision']}" in config["Env"]
    assert labels["org.opencontainers.image.title"] == f"spectraqlora/{name}"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", labels["org.opencontainers.image.base.digest"])
    assert labels["org.opencontainers.image.base.name"]
    assert config["User"] == f"{IMAGE_USER}:0"
    megabytes = found.attrs["Size"] / 1e6
    print(f"{name}: {megabytes:.0f} MB")
    assert found.attrs["Size"] < LIMIT_BYTES.get(name, 2.0e9)


@pytest.mark.parametrize("name", [*images(), MLFLOW])
def test_no_compiler_no_cache_no_installer_and_nothing_of_the_build_machine(docker: Any, name: str) -> None:
    script = r"""
for program in gcc cc g++ clang make ld pip pip3 git curl; do command -v $program && echo found; done
find / -xdev \( -path /proc -o -path /sys \) -prune -o \( -name '*.whl' -o -name '.cache' -o -name 'pip.conf' \
    -o -name '*.deb' -o -name 'id_rsa*' -o -name '.netrc' \) -print 2>/dev/null | grep -v '/ensurepip/'
find /var/lib/apt/lists /var/cache/apt -type f -not -name lock -not -name '*.bin' -size +0 2>/dev/null
env | grep -iE 'proxy|token|secret|password|index|cert'
ls /usr/local/share/ca-certificates
"""
    code, said = contained(docker, name, "-c", script, entrypoint=["sh"])
    if "/usr/local/bin/pip" in said:  # Docker's own Python image brings the installer.
        said = re.sub(r"/usr/local/bin/pip3?\nfound\n", "", said)
    assert (code, said) == (0, "")
    history = json.dumps(docker.images.get(image_reference(name)).history())
    assert not re.search(r"secret|token=|password|PIP_|https?://", history, re.IGNORECASE)


@pytest.mark.parametrize("name", images())
def test_an_image_loads_its_steps_and_only_the_light_one_lacks_torch(docker: Any, name: str) -> None:
    code, said = contained(docker, name, "python3", "-c", IMPORTS)
    assert code == 0, said
    assert said.splitlines()[-1] == str(name != "light")


@pytest.mark.parametrize("name", images())
def test_an_image_explains_its_steps(docker: Any, name: str) -> None:
    code, said = contained(docker, name, "--help")
    assert code == 0
    for step in images()[name]:
        assert step in said
        code, shown = contained(docker, name, step, "--help")
        assert code == 0 and f"usage: {step}" in shown and "Example: " in shown


def test_steps_run_by_hand_with_plain_arguments(
    docker: Any, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """From base model to adapter, each step in its image, by a user that the images do not know."""
    tmp_path.chmod(0o777)
    mounts = {tmp_path: "/steps", tiny_model: "/model", tiny_rows.parent: "/rows"}
    for path in (tiny_model.parent, *tiny_model.iterdir(), tiny_rows.parent, tiny_rows):
        path.chmod(path.stat().st_mode | 0o055)

    def step(name: str, *arguments: str, where: str = "") -> str:
        code, said = contained(docker, where or name, *([name] if where else []), *arguments, mounts=mounts)
        assert code == 0, said
        return said

    step(
        "quantize-load", "--base-model", "/model", "--four-bit", "/steps/four_bit", "--outline", "/steps/outline",
    )  # fmt: skip
    said = step(
        "prepare-data", "--source", f"/rows/{tiny_rows.name}", "--outline", "/steps/outline",
        "--rows", "/steps/rows", where="light",
    )  # fmt: skip
    assert json.loads(said.splitlines()[-1])["rows"]["train_rows"] > 0
    step("snr-analyze", "--outline", "/steps/outline", "--table", "/steps/table")
    step(
        "measure-base", "--methods", "hybrid", "--four-bit", "/steps/four_bit", "--rows", "/steps/rows",
        "--measurement", "/steps/measurement", where="re-evaluate",
    )  # fmt: skip
    step(
        "select-layers", "--method", "hybrid", "--select-settings", '{"rank": 4}',
        "--outline", "/steps/outline", "--table", "/steps/table", "--measurement", "/steps/measurement",
        "--rank-map", "/steps/rank_map",
    )  # fmt: skip
    step(
        "train", "--four-bit", "/steps/four_bit", "--rows", "/steps/rows", "--rank-map", "/steps/rank_map",
        "--adapter", "/steps/adapter", "--train-settings", '{"max_steps": 3}',
    )  # fmt: skip
    assert RankMap.read(tmp_path / "rank_map").method == "hybrid"
    assert TrainingLog.read(tmp_path / "adapter").round == 1


def test_bad_input_is_one_line_with_exit_code_2(docker: Any) -> None:
    code, said = contained(docker, "train", "--train-settings", "{}")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_mlflows_server_has_all_that_it_needs(docker: Any) -> None:
    code, said = contained(docker, MLFLOW, "db", "upgrade", "sqlite:////tmp/mlflow.db")
    assert code == 0, said
    script = "import boto3, psycopg, mlflow.server.fastapi_app; print(psycopg.pq.__impl__)"
    code, said = contained(docker, MLFLOW, "-c", script, entrypoint=["python3"])
    assert code == 0 and said.split()[-1] == "binary", said
