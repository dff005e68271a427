"""Collects what a bare GPU machine lacks: wheels for its Python, and the small model of the tests.

    python -m tests.gpu.wheels [--output build/gpu] [--model FOLDER]

Such a machine has PyTorch with CUDA 13 and the usual libraries, and no way to fetch others. Versions are those of
the Python that runs this; transformers and PEFT travel too, since what is there may be older than the project bears.
Of bitsandbytes only the libraries for CUDA 13.0 and for the CPU are kept (4 MB of 43), of botocore, which is only
imported, only what it knows of S3 (1 MB of 15).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PYTHON = (3, 12)
"""Python of the GPU machine."""
PACKAGES = (
    "bitsandbytes", "transformers", "peft",
    "datasets", "multiprocess", "dill", "xxhash", "fsspec",
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
    "jinja2", "markupsafe", "boto3", "botocore", "s3transfer", "jmespath", "urllib3", "python-dateutil", "six",
    "pytest", "pluggy", "iniconfig",
)  # fmt: skip
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
_SERVICE = re.compile(r"botocore/data/(?!s3/)[^/]+/")
LIMIT = 60 * 10**6
"""Bytes that all of it may have."""
MODEL = "SPECTRAQLORA_TEST_MODEL"
"""Environment variable that names the folder of the tests' small model."""


def fetch(packages: tuple[str, ...], folder: Path) -> None:
    """Download the wheel of each package, in the version installed here, for the GPU machine's Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", ".".join(map(str, PYTHON)), "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--dest", str(folder), *(f"{name}=={version(name)}" for name in packages)]
    subprocess.run(command, check=True)


def other_libraries(name: str) -> bool:
    """Whether a file of bitsandbytes is a library that the check has no use for."""
    return name.endswith(".so") and Path(name).name not in LIBRARIES


def other_services(name: str) -> bool:
    """Whether a file of botocore describes a service other than S3."""
    return _SERVICE.match(name) is not None


REDUCED: dict[str, Callable[[str], bool]] = {
    "bitsandbytes": other_libraries,
    "botocore": other_services,
}
"""What is left out of a package's wheel."""


def reduce(wheel: Path, left_out: Callable[[str], bool]) -> None:
    """Rewrite a wheel without some of its files, and without their lines in RECORD."""
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as kept:
        for entry in whole.infolist():
            if left_out(entry.filename):
                continue
            content = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not left_out(line.split(",")[0])).encode()
            kept.writestr(entry, content, zipfile.ZIP_DEFLATED)
    os.replace(partial, wheel)


def unpack(wheels: Path, folder: Path) -> None:
    """Lay the wheels' modules into a folder for PYTHONPATH."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def collect(output: Path, model: Path | None) -> None:
    """Make the folder anew and print what it holds; it appears complete or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".gpu-") as place:
        scratch = Path(place)
        fetch(PACKAGES, scratch / "wheels")
        for name, left_out in REDUCED.items():
            (wheel,) = (scratch / "wheels").glob(f"{name}-*.whl")
            reduce(wheel, left_out)
        if model:
            shutil.copytree(model, scratch / "model", copy_function=shutil.copyfile)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        for path in scratch.iterdir():
            path.rename(output / path.name)
    for path in sorted(output.glob("*/*")):
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(output)}")
    total = size(output)
    print(f"{total / 1e6:7.2f} MB  {output}, all of it; at most {LIMIT / 1e6:.0f}")
    if model is None:
        print(f"without the tests' model: {MODEL} names no folder; the check makes a smaller one itself")
    if total > LIMIT:
        raise SystemExit(f"{output} is too large to travel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--model", type=Path, default=os.environ.get(MODEL) or None)
    options = parser.parse_args()
    if options.model and not (options.model / "config.json").exists():
        parser.error(f"--model: {options.model} is no model folder")
    collect(options.output, options.model)


if __name__ == "__main__":
    main()
