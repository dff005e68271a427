"""What the commands write to: standard output, standard error, and progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
errors = Console(stderr=True, soft_wrap=True)


def line(text: str, style: str | None = None) -> None:
    """One line of plain text, however long: it is the terminal that wraps it, so that it can be copied."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def bars(screen: Console, bar_width: int = 40, speed_estimate_period: float = 30.0) -> Progress:
    """Progress bars that leave nothing behind.

    Args:
        screen: where they are drawn.
        bar_width: in characters.
        speed_estimate_period: how many seconds the estimate of the time left looks back.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
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
