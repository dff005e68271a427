"""The table of values in the chart's README: `python -m tests.chart_reference` writes it again.

Keys and descriptions come from values.schema.json, defaults from values.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "charts" / "spectraqlora"
BEGIN, END = "<!-- values -->", "<!-- end of values -->"


def rows(schema: dict[str, Any], values: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every value; a key without default has none."""
    for name, part in schema["properties"].items():
        key = f"{prefix}{name}"
        if name not in values:
            continue
        if "properties" in part and isinstance(values[name], dict) and values[name]:
            yield from rows(part, values[name], f"{key}.")
        else:
            yield key, json.dumps(values[name]), part["description"]


def table() -> str:
    """The Markdown table."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in rows(schema, values)]
    return "\n".join(lines)


def readme_with(table: str) -> str:
    """The README with its table replaced."""
    text = (CHART / "README.md").read_text()
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme_with(table()))
