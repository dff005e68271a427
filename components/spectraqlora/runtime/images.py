"""Names of the step images, and which steps run in which."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from spectraqlora import __version__

IMAGE_REFERENCE = "SPECTRAQLORA_IMAGE_REFERENCE"
"""Environment variable of a step's container: its image in full, as a cluster names it."""
IMAGE_USER = 10001
"""User of the images, whose group is 0."""
_STEPS = Path(__file__).resolve().parents[1] / "steps"


def image_reference(name: str) -> str:
    """The image of a step, tagged with the package's version."""
    return f"spectraqlora/{name}:{__version__}"


def step_names() -> list[str]:
    """All steps, each a folder of `steps` that holds a component."""
    return sorted(path.parent.name.replace("_", "-") for path in _STEPS.glob("*/component.py"))


def component_of(step: str) -> Any:
    """A step's component, as `runtime.component` made it."""
    name = step.replace("-", "_")
    return getattr(importlib.import_module(f"spectraqlora.steps.{name}.component"), name)


def images() -> dict[str, list[str]]:
    """Every image with the steps that run in it, as their components say."""
    from spectraqlora.runtime.component import plain

    steps_of: dict[str, list[str]] = {}
    for step in step_names():
        steps_of.setdefault(plain(component_of(step)).__dict__["image"], []).append(step)
    return dict(sorted(steps_of.items()))
