"""What the commands write to: standard output, standard error, and progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from spectraqlora.errors import printable


class Screen(Console):
    """A console on which text is text: square brackets are no markup, and no text moves a terminal's cursor.

    What is shown comes from data, models and registries that others write to.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich has it; control characters in a text are written out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


console = Screen()
errors = Screen(stderr=True, soft_wrap=True)


def line(text: str, style: str | None = None) -> None:
    """One line of plain text, however long: it is the terminal that wraps it, so that it can be copied."""
    console.print(printable(text), style=style, soft_wrap=True, highlight=False)


def bars(screen: Console, bar_width: int = 40, speed_estimate_period: float = 30.0) -> Progress:
    """Progress bars that leave nothing behind.

    Args:
        screen: where they are drawn.
        bar_width: in characters.
        speed_estimate_period: how many seconds the estimate of the time left looks back.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        speed_estimate_period=speed_estimate_period,
    )


def escaped(text: str) -> str:
    """Text in which square brackets are no markup."""
    return text.replace("[", "\\[")
