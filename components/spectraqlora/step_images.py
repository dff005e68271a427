"""Names of the step images."""

from spectraqlora import __version__


def image(name: str) -> str:
    """The image of a step, tagged with the package's version."""
    return f"spectraqlora/{name}:{__version__}"
