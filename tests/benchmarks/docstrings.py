"""A data set that every machine has: what the functions of Python's standard library do, in their authors' words.

    python -m tests.benchmarks.docstrings OUTPUT.jsonl

One row per function, method or class with a docstring: its signature, and the docstring's first sentence.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip"}


def rows() -> list[dict[str, str]]:
    """Prompts and completions, none twice, in a fixed random order."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str], None] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _LEFT_OUT & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found.update(dict.fromkeys(_documented(tree, ".".join(part for part in parts if part != "__init__"))))
    ordered = [{"prompt": prompt, "completion": completion} for prompt, completion in found]
    random.Random(0).shuffle(ordered)
    return ordered


def _documented(tree: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{place}.{node.name}"
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        sentence = text.split(". ")[0].rstrip(".")
        if len(sentence.split()) >= 3:
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield f"What does {name}{arguments} do?", f"{sentence}."
        yield from _documented(node, name)


if __name__ == "__main__":
    written = rows()
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    print(f"{len(written):,} rows")
