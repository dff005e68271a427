"""Write the lock files of the images and of development: every package pinned with its hashes, one version across all.

Run by `make lock`. Bounds come from pyproject.toml; each image's lock lists what it adds to the base it stands
on. PyPI's torch for Linux brings the CUDA libraries; the CPU wheel is published on TORCH_INDEX instead, or
is in a folder that pip's find-links names. `make install` takes the torch that pip finds, of the pinned version, so
the development lock has neither torch nor what only its CUDA build brings.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

IMAGES = Path(__file__).parent
BASE = IMAGES / "base"
DEVELOPMENT = IMAGES.parent / "pipelines" / "requirements"
PLATFORM, PYTHON = "x86_64-manylinux_2_28", "3.11"
HEADER = "# Written by images/lock.py (make lock) from {}.\n"
_CUDA_ONLY = re.compile(r"^(nvidia-|cuda-|triton$)")
LEFT_OUT = ("databricks-sdk", "google-auth", "pyasn1", "pyasn1-modules")
"""What MLflow asks for to talk to Databricks' own servers, which no step does."""
WITHOUT_TORCH = ("light", "mlflow")
"""Images that stand on `base` and not on `torch`."""
_NAME = re.compile(r"^([a-zA-Z0-9._-]+)")


def compile_(*arguments: str | Path, target: Iterable[str] = ("--python-platform", PLATFORM)) -> str:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", PYTHON]
    done = subprocess.run(
        [*command, *target, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def names(text: str) -> list[str]:
    """Names of the packages in a requirements text, in order."""
    matches = (_NAME.match(line) for line in text.splitlines())
    return [match[1].lower() for match in matches if match]


def bounds() -> str:
    """The project's own bounds as constraints; the steps' images carry mlflow without its server."""
    project = tomllib.loads((IMAGES.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    skinny = [line.replace("mlflow>", "mlflow-skinny>") for line in project if line.startswith("mlflow>")]
    return "".join(f"{line}\n" for line in [*project, *skinny])


SOURCE_ONLY = ("kfp-server-api",)
"""Published without a wheel: images/wheels.sh builds one from the locked source."""


def without(packages: Iterable[str]) -> list[str]:
    return [part for name in sorted(packages) for part in ("--no-emit-package", name)]


def cpu_torch_digest(folder: Path, version: str) -> str:
    index = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"),
            *("--extra-index-url", index, "--dest", str(folder), f"torch=={version}+cpu"),
        ],
        check=True,
    )
    (wheel,) = folder.glob("torch-*.whl")
    with open(wheel, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lock_development(pins: Path, torch_alone: Iterable[str], scratch: Path) -> None:
    """What `make install` takes: for every platform and Python, what builds the project first."""
    project = IMAGES.parent / "pyproject.toml"
    build = scratch / "build.in"
    build.write_text("\n".join(tomllib.loads(project.read_text())["build-system"]["requires"]))
    everything = ["--extra", "dev", "-c", pins, *without(torch_alone)]
    for name, source, arguments in (("build", build, []), ("development", project, everything)):
        text = compile_(source, *arguments, "--generate-hashes", "--universal", target=())
        (DEVELOPMENT / f"{name}.lock").write_text(HEADER.format("pyproject.toml") + text)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "bounds.txt"
        constraints.write_text(bounds())
        inputs = [*sorted(BASE.glob("*.in")), *sorted(IMAGES.glob("*/requirements.in"))]
        pins = Path(scratch) / "pins.txt"
        pins.write_text(compile_(*inputs, "-c", constraints))

        def lock(source: Path, target: Path, *arguments: str) -> list[str]:
            text = compile_(source, "-c", pins, "--generate-hashes", *arguments)
            target.write_text(HEADER.format(source.name) + text)
            return names(text)

        common = lock(BASE / "requirements.in", BASE / "requirements.lock")
        for alone in ("kfp", "pip"):
            lock(BASE / f"{alone}.in", BASE / f"{alone}.lock", "--no-deps")
        # torch itself, and what only its CUDA build brings, apart from what both variants share.
        above = names(compile_(BASE / "torch.in", "-c", pins, *without(common)))
        variant = [name for name in above if name == "torch" or _CUDA_ONLY.match(name)]
        shared = lock(BASE / "torch.in", BASE / "torch.lock", *without([*common, *variant]))
        lock(BASE / "torch.in", BASE / "torch-cuda.lock", *without([*common, *shared]))
        (version,) = re.findall(r"^torch==(.*)$", pins.read_text(), re.MULTILINE)
        digest = cpu_torch_digest(Path(scratch), version)
        (BASE / "torch-cpu.lock").write_text(
            HEADER.format("torch.in") + f"torch=={version} \\\n    --hash=sha256:{digest}\n"
        )
        lock(IMAGES / "light" / "source.in", IMAGES / "light" / "source.lock", "--no-deps")
        for source in sorted(IMAGES.glob("*/requirements.in")):
            if source.parent != BASE:
                name = source.parent.name
                stands_on = [*common, "kfp"] if name in WITHOUT_TORCH else [*common, *above]
                # KFP's and Kubernetes' clients sign in with google-auth; the other images have no client.
                left_out = LEFT_OUT[:1] if name in ("light", "train") else LEFT_OUT
                lock(source, source.with_suffix(".lock"), *without([*stands_on, *left_out, *SOURCE_ONLY]))
        lock_development(pins, variant, Path(scratch))


if __name__ == "__main__":
    main()
