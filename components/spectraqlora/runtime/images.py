"""Names of the step images, and which steps run in which."""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from spectraqlora import __version__

IMAGE = "SPECTRAQLORA_IMAGE"
"""Environment variable in which an image has its name."""
REVISION = "SPECTRAQLORA_REVISION"
"""Environment variable of a step's container: the source revision that its image was built from."""
IMAGE_REFERENCE = "SPECTRAQLORA_IMAGE_REFERENCE"
"""Environment variable of a step's container: its image in full, as a cluster names it."""
IMAGE_USER = 10001
"""User of the images, whose group is 0."""
_STEPS = Path(__file__).resolve().parents[1] / "steps"


def image_reference(name: str) -> str:
    """The image of a step, tagged with the package's version."""
    return f"spectraqlora/{name}:{__version__}"


def step_image() -> str:
    """The image that this step runs in: as the cluster names it, else as it was built."""
    built = os.environ.get(IMAGE)
    return os.environ.get(IMAGE_REFERENCE) or (image_reference(built) if built else "none, a local process")


def step_names() -> list[str]:
    """All steps, each a folder of `steps` that holds a component."""
    return sorted(path.parent.name.replace("_", "-") for path in _STEPS.glob("*/component.py"))


def component_of(step: str) -> Any:
    """A step's component, as `runtime.component` made it."""
    name = step.replace("-", "_")
    return getattr(importlib.import_module(f"spectraqlora.steps.{name}.component"), name)


@cache
def own_image(step: str) -> str:
    """Name of the image that a step runs in, as its component says."""
    from spectraqlora.runtime.component import plain

    return str(plain(component_of(step)).__dict__["image"])


def images() -> dict[str, list[str]]:
    """Every image with the steps that run in it, as their components say."""
    steps_of: dict[str, list[str]] = {}
    for step in step_names():
        steps_of.setdefault(own_image(step), []).append(step)
    return dict(sorted(steps_of.items()))
