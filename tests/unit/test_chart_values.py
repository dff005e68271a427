"""The chart's values, schema and version say the same."""

import json
from typing import Any

import yaml
from spectraqlora_pipelines.reference import CHART, chart_rows, chart_schema


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
    assert all(meaning for _, _, meaning in chart_rows(schema, values))


def test_the_schema_of_settings_and_values_file_is_as_the_code_has_it() -> None:
    assert (CHART / "values.schema.json").read_text() == chart_schema(), "make docs"


def test_the_chart_has_the_packages_version() -> None:
    from spectraqlora import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
