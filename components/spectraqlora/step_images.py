"""Names of the step images, and which steps run in which."""

import re
from pathlib import Path

from spectraqlora import __version__

_NAMED = re.compile(r"base_image=image\(\"([a-z0-9-]+)\"\)")


def image(name: str) -> str:
    """The image of a step, tagged with the package's version."""
    return f"spectraqlora/{name}:{__version__}"


def images() -> dict[str, list[str]]:
    """Every image with the steps that run in it, as their components say."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path(__file__).parent.glob("*/component.py")):
        named = _NAMED.search(path.read_text(encoding="utf-8"))
        if named:
            found.setdefault(named[1], []).append(path.parent.name.replace("_", "-"))
    return found
