"""The chart's values, schema, README and version say the same."""

import json
from typing import Any

import yaml

from tests.chart_reference import CHART, readme_with, rows, table


def test_the_readme_has_every_value_with_its_default_and_meaning() -> None:
    assert (CHART / "README.md").read_text() == readme_with(table()), "python -m tests.chart_reference"


def test_schema_and_values_have_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(part: dict[str, Any], given: Any, path: str) -> None:
        if "properties" not in part or not given:
            return
        assert part["additionalProperties"] is False, f"{path} lets unknown keys through"
        assert set(given) == set(part["properties"]) - {"global"}, path
        for key, value in given.items():
            compare(part["properties"][key], value, f"{path}.{key}")

    compare(schema, values, "values")
    assert all(meaning for _, _, meaning in rows(schema, values))


def test_the_chart_has_the_packages_version() -> None:
    from spectraqlora import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
