"""The images' files agree with the components, the locks with the project's bounds."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from spectraqlora.runtime import command_line
from spectraqlora.runtime.images import images

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "images"
PACKAGE = ROOT / "components" / "spectraqlora"
DEVELOPMENT = sorted((ROOT / "pipelines" / "requirements").glob("*.lock"))
LOCKS = sorted(IMAGES.glob("*/*.lock"))
_PIN = re.compile(r"^([a-z0-9._-]+)==(\S+)", re.MULTILINE)
DISTRIBUTIONS = {"yaml": "pyyaml", "mlflow": "mlflow-skinny", "botocore": "boto3", "google": "protobuf"}
"""Import names that are not the name of the package."""
SERVERS = {"mlflow"}
"""Images that run no step."""
NOT_REACHED = {
    "light": {"bitsandbytes", "peft", "scipy", "torch"},
    "re-evaluate": {"scipy"},
    "select-layers": {"matplotlib"},
    "train": {"scipy"},
}
"""What modules that an image's steps use would import for others: weights, sgm's groups, pictures of the SNR table."""


def pins(*locks: Path) -> dict[str, str]:
    return {name: version for lock in locks for name, version in _PIN.findall(lock.read_text())}


def locks_of(image: str) -> list[Path]:
    own = [IMAGES / image / f"{name}.lock" for name in ("requirements", "source")]
    below = ["requirements", "kfp"] + ([] if image in ("light", *SERVERS) else ["torch", "torch-cpu"])
    return [IMAGES / "base" / f"{name}.lock" for name in below] + [path for path in own if path.exists()]


def test_every_image_that_a_component_names_has_a_folder_and_its_own_name() -> None:
    folders = {path.parent.name for path in IMAGES.glob("*/requirements.lock")} - {"base"}
    assert folders == set(images()) | SERVERS
    assert set(command_line.steps()) == {
        path.parent.name.replace("_", "-") for path in PACKAGE.glob("steps/*/component.py")
    }


def test_the_bake_file_builds_the_same_images() -> None:
    text = (IMAGES / "docker-bake.hcl").read_text()
    (matrix,) = re.findall(r"step = \[(.*?)\]", text)
    assert sorted([*re.findall(r'"([a-z-]+)"', matrix), "light"]) == sorted(images())
    assert set(re.findall(r'^target "([a-z-]+)"', text, re.M)) >= SERVERS
    used = set(re.findall(r"^ARG (\w+)", "".join(p.read_text() for p in IMAGES.glob("*/Dockerfile")), re.M))
    given = set(re.findall(r"(\w+) = ", "".join(re.findall(r"args\s+= \{(.*)\}", text))))
    assert given == used


@pytest.mark.parametrize("lock", [*LOCKS, *DEVELOPMENT], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_locked_packages_have_hashes_and_stay_within_the_projects_bounds(lock: Path) -> None:
    blocks = [block for block in re.split(r"\n(?=\S)", lock.read_text()) if not block.startswith("#")]
    assert blocks
    for block in blocks:
        assert re.match(r"[a-z0-9._-]+==[^\n]+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n?)+$", block), block
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {requirement.name: requirement for requirement in map(Requirement, project)}
    bounds["mlflow-skinny"] = bounds["mlflow"]
    for name, version in pins(lock).items():
        if name in bounds:
            assert bounds[name].specifier.contains(version), f"{name} {version}: make lock"


def test_one_version_of_a_package_across_all_images() -> None:
    found: dict[str, set[str]] = {}
    for lock in LOCKS:
        for name, version in pins(lock).items():
            found.setdefault(name, set()).add(version)
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_what_is_installed_for_tests_is_locked_in_the_images_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    asked += project["build-system"]["requires"]
    locked = pins(*DEVELOPMENT)
    assert {Requirement(line).name.lower() for line in asked} - {"torch"} <= locked.keys(), "make lock"
    in_images = pins(*LOCKS)
    both = locked.keys() & in_images.keys() - {"setuptools"}
    assert {name: locked[name] for name in both} == {name: in_images[name] for name in both}, "make lock"


def test_what_an_image_asks_for_is_locked() -> None:
    for source in IMAGES.glob("*/*.in"):
        asked = [line for line in source.read_text().splitlines() if line and not line.startswith("#")]
        locks = [source.with_suffix(".lock")]
        if source.stem == "torch":
            locks.append(IMAGES / "base" / "torch-cpu.lock")
        below = [] if source.parent.name == "base" else locks_of(source.parent.name)
        assert set(asked) <= pins(*locks, *below, IMAGES / "base" / "requirements.lock").keys(), source


def test_the_mlflow_image_has_the_driver_that_sqlalchemy_takes_for_its_database() -> None:
    from sqlalchemy.engine import make_url

    held = pins(*locks_of("mlflow"))
    driver = make_url("postgresql://me@host/mlflow").get_driver_name()
    assert {driver, f"{driver}-binary", "boto3", "mlflow"} <= held.keys()
    assert held["mlflow"] == held["mlflow-skinny"], "the server has the version of the steps' client"
    chart = yaml.safe_load((ROOT / "charts" / "spectraqlora" / "values.yaml").read_text())
    assert chart["mlflow"]["server"]["image"]["repository"] == "spectraqlora/mlflow"


def imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """(own modules, other packages) that code imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name for name in names if name.split(".")[0] == "spectraqlora"}
    return own, {name.split(".")[0] for name in names - own} - set(sys.stdlib_module_names)


def reached(step: str) -> tuple[set[str], set[str]]:
    """(own modules, other packages) that a step may import, by whatever it imports."""
    folder = f"spectraqlora.steps.{step.replace('-', '_')}"
    waiting, seen, needed = {f"{folder}.component", f"{folder}.step"}, set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        path = PACKAGE.parent.joinpath(*name.split("."))
        module = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if name not in seen and module.exists():
            seen.add(name)
            own, others = imports(ast.parse(module.read_text()))
            waiting |= own
            needed |= others
    return seen, needed


@pytest.mark.parametrize("step", command_line.steps())
def test_an_image_holds_what_its_steps_may_import(step: str) -> None:
    """Followed from the step's function through every module that it may reach."""
    _, needed = reached(step)
    (image,) = [name for name, steps in images().items() if step in steps]
    held = pins(*locks_of(image)).keys()
    missing = {name for name in needed if DISTRIBUTIONS.get(name, name.replace("_", "-")) not in held}
    assert missing <= NOT_REACHED.get(image, set()), f"{image}: add {missing} to requirements.in, make lock"
