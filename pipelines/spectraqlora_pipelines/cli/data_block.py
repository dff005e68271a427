"""What became of the data, as a block on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text
from spectraqlora.artifacts import Example, PreparedRows
from spectraqlora.data.accounting import facts, warning

EXAMPLE_CHARACTERS = 600
"""Longer examples are cut on the screen."""
_LEARNED = "green"


def show_rows(rows: PreparedRows, screen: Console) -> None:
    """What was read, kept and dropped, and examples with the learned part marked."""
    table = Table(title="Data", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(rows):
        table.add_row(name, Text(value))
    for number, example in enumerate(rows.examples, 1):
        table.add_row(f"example {number}", example_text(example, screen.is_terminal))
    screen.print(table)
    if lost := warning(rows):
        screen.print(f"Data: {lost}", style="yellow", soft_wrap=True, highlight=False)


def example_text(example: Example, colours: bool) -> Text:
    """A rendered row with its learned part in colour, or between » and « where there are no colours."""
    shown, room = Text(), EXAMPLE_CHARACTERS
    for text, learned in example:
        part = text if len(text) <= room else f"{text[: max(room, 0)]} …"
        room -= len(text)
        if learned:
            shown.append(part if colours else f"»{part}«", style=_LEARNED)
        else:
            shown.append(part)
        if room <= 0:
            break
    return shown
