"""Times of recurring runs in the grammar of Kubeflow Pipelines' scheduler (robfig/cron v1).

Its lines have six fields and begin with seconds; a five-field crontab line would be read one field off.
"""

from __future__ import annotations

import re

from spectraqlora.errors import InputError

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("second", 0, 59, {}),
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def cron_line(text: str) -> str:
    """The line as KFP reads it; a crontab line of five fields gets second 0 in front.

    Raises:
        InputError: it does not parse, or a number is out of its field's range.
    """
    fields = text.split()
    if len(fields) == 1 and fields[0] in _SHORTHANDS:
        return fields[0]
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise InputError(
            "--cron", text, 'five fields (minute hour day month weekday) as in "0 3 * * 1", six with seconds '
            f"in front, or one of {', '.join(_SHORTHANDS)}"
        )  # fmt: skip
    for field, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            _check(text, part, name, low, high, names)
    return " ".join(fields)


def _check(line: str, part: str, name: str, low: int, high: int, names: dict[str, int]) -> None:
    spread, _, step = part.partition("/")
    first, dash, last = spread.partition("-")
    wild = spread in ("*", "?")

    def number(text: str) -> int | None:
        return names.get(text.upper(), int(text) if re.fullmatch(r"\d{1,2}", text) else None)

    start, stop = (low, high) if wild else (number(first), number(last if dash else first))
    good = (
        start is not None
        and stop is not None
        and low <= start <= stop <= high
        and ("/" not in part or (re.fullmatch(r"\d{1,2}", step) is not None and int(step) > 0))
    )
    if not good:
        words = f" or {next(iter(names))}-{list(names)[-1]}" if names else ""
        raise InputError("--cron", line, f"{low}-{high}{words} as {name}, not {part!r}")


def argo_schedule(cron: str, every: str) -> str:
    """The line of a CronWorkflow: five fields of a crontab, a shorthand, or `@every 6h`.

    Args:
        cron: a cron line, or empty.
        every: an interval such as 6h or 1d, or empty.

    Raises:
        InputError: a line with seconds, which Argo does not know, or one that does not parse.
    """
    if every:
        interval_seconds(every)
        # Go's durations have no days.
        return f"@every {24 * int(every[:-1])}h" if every.endswith("d") else f"@every {every}"
    if len(cron.split()) == 6:
        raise InputError("--cron", cron, "five fields without seconds, for Argo Workflows")
    return cron_line(cron).removeprefix("0 ") if len(cron.split()) == 5 else cron_line(cron)


def interval_seconds(text: str) -> int:
    """Seconds of an interval such as 30m, 6h or 1d; at least a minute."""
    parts = re.fullmatch(r"([1-9]\d{0,6})([smhd])", text.strip())
    seconds = int(parts[1]) * _UNITS[parts[2]] if parts else 0
    if seconds < 60:
        raise InputError("--every", text, "a number and s, m, h or d, at least one minute; such as 6h")
    return seconds
