"""YAML that people write, as plain values: what only a program would write is refused before anything looks at it."""

from __future__ import annotations

from typing import Any

import yaml

_MOST_VALUES = 10_000
"""Values in a document with every alias written out; a few lines of aliases of aliases would be billions."""
_DEEPEST = 50


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """YAML's plain types, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML has it, which takes the last of two equal keys without a word."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice; each once", key.start_mark
                    )
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def read_yaml(text: str) -> Any:
    """The value of a YAML document: mappings with text as keys, lists, text, numbers, booleans, nothing.

    Raises:
        ValueError: it is no YAML, has other types (dates, sets, bytes, Python's own), gives a key twice, or is larger or
            deeper than any settings are; in one line.
    """
    try:
        value = yaml.load(text, _Loader)
        _count(value, {}, 0)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[-1].strip()
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{problem}{where}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    return value


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values a value is with every alias written out; each is looked at once."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(value, str | int | float | None):
        return 1
    if not isinstance(value, dict | list):
        raise ValueError(f"{str(value)[:60]!r} is a {type(value).__name__}; text is put in quotes")
    if id(value) not in known:
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"the key {str(key)[:60]!r} is no text; it is put in quotes")
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(each, known, depth + 1) for each in inner)
        if known[id(value)] > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
    return known[id(value)]
