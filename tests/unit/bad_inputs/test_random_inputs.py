"""Data, settings and values files damaged at random: taken, or refused in one line; none ends in a traceback or hangs."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from spectraqlora.data.checks import check_sources
from spectraqlora.data.for_model import RowModel, row_model
from spectraqlora.documents import read_yaml
from spectraqlora.places import data_place
from spectraqlora.settings import DataSettings, Settings, parse
from spectraqlora.steps.prepare_data.prepare import prepare_for
from spectraqlora_pipelines.cli.options import load_settings
from spectraqlora_pipelines.cluster.values import read_values

from tests.damage import damaged_bytes, damaged_json, outcome

INPUTS = 30
"""Of each kind, in every test run."""
SECONDS = int(os.environ.get("SPECTRAQLORA_SOAK_SECONDS", "1200"))
"""Of each kind, under the mark `soak`, with seeds that are new each time."""
VALUES = Path(__file__).parents[3] / "pipelines" / "cluster-values.yaml"
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]  # fmt: skip
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": [1]}}}
FORMS: list[dict[str, Any]] = [
    {"question": "q", "answer": "a", "id": 7}, {"prompt": "p", "completion": "c"}, {"text": "a text"}, {"instruction": "i", "input": "n", "output": "o"}, {"messages": TURNS},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, {"question": "q", "answer": "a", "history": [["q", "a"]], "system": "s"}, {"prompt": "p", "chosen": "a", "rejected": "b"},
]  # fmt: skip
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".jsonl.gz", ".jsonl.zst"]


def data_file(chance: random.Random, folder: Path) -> Path:
    """A file of rows of one form, of which one or a few rows, or bytes, are damaged."""
    form = chance.choice(FORMS)
    rows = [json.loads(json.dumps(form).replace('"q"', f'"q {number}"')) for number in range(24)]
    for _ in range(chance.choice([0, 1, 1, 3])):
        at = chance.randrange(len(rows))
        rows[at] = damaged_json(rows[at], chance)
    suffix = chance.choice([".jsonl", ".jsonl", *SUFFIXES])
    path = folder / f"data{suffix}"
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        content = json.dumps(rows).encode()
    elif suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        fields = [row.values() if isinstance(row, dict) else [row] for row in rows]
        content = "\n".join(mark.join(map(str, row)) for row in [form, *fields]).encode()
    elif suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([chance.choice(FORMS[:4])] * 24), sink)
        content = sink.getvalue().to_pybytes()
    if suffix != ".jsonl" or chance.random() < 0.3:
        content = damaged_bytes(content, chance)
    path.write_bytes(content)
    return path


def learn(seed: int, folder: Path, model: RowModel) -> str:
    chance = random.Random(seed)
    path = data_file(chance, folder)
    given: dict[str, Any] = {"source": str(path)}
    if chance.random() < 0.3:
        given = {**DataSettings().model_dump(mode="json"), **given}
        given = {**damaged_json(given, chance), "source": str(path)}

    def act() -> None:
        section = parse({"data": given}).data
        check_sources([data_place(str(path))], section, model)
        prepare_for(model, section, 42, folder / "rows")

    return outcome(act, f"data, seed {seed}: {path.name}")


def set_(seed: int, folder: Path, model: RowModel) -> str:
    chance = random.Random(seed)
    document: Any = Settings().model_dump(mode="json")
    for _ in range(chance.choice([1, 1, 2])):
        document = damaged_json(document, chance)
    file = folder / "settings.yaml"
    content = yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    file.write_bytes(damaged_bytes(content, chance) if chance.random() < 0.3 else content)
    return outcome(lambda: load_settings(file, {}, None), f"settings, seed {seed}")


def place(seed: int, folder: Path, model: RowModel) -> str:
    chance = random.Random(seed)
    document: Any = read_yaml(VALUES.read_text(encoding="utf-8"))
    for _ in range(chance.choice([1, 1, 2])):
        document = damaged_json(document, chance)
    file = folder / "values.yaml"
    content = yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    file.write_bytes(damaged_bytes(content, chance) if chance.random() < 0.3 else content)
    return outcome(lambda: read_values(file), f"values, seed {seed}")


KINDS: dict[str, Callable[[int, Path, RowModel], str]] = {"data": learn, "settings": set_, "values": place}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> RowModel:
    return row_model(tiny_model, DataSettings())


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_damage_ends_in_a_traceback_or_hangs(kind: str, model: RowModel, tmp_path: Path) -> None:
    outcomes = Counter(KINDS[kind](seed, tmp_path, model) for seed in range(INPUTS))
    assert outcomes["refused"] and outcomes["taken"], outcomes


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_no_new_random_damage_does_either(kind: str, model: RowModel, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        outcomes[KINDS[kind](random.SystemRandom().randrange(2**60), tmp_path, model)] += 1
    print(f"{kind}: {dict(outcomes)}")
