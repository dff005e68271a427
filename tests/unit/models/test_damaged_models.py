"""A hundred damaged model folders: run, snr and plan say in one line what is wrong, or take them; none hangs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import inspect_folder, open_tensors
from spectraqlora.places import base_digest, base_place
from spectraqlora.settings import parse
from spectraqlora_pipelines.cli.plan import planned_for

from tests.models import WEIGHTS, header_of

FOLDERS = int(os.environ.get("SPECTRAQLORA_DAMAGED", "100"))
"""`SPECTRAQLORA_DAMAGED=5000 pytest tests/unit/models/test_damaged_models.py` tries more."""
LIMIT_S = 20
JUNK: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e308, float("nan"), "", "x", "../../etc/passwd",
    "\x1b[31m\n", "é" * 300, [], [None], [[[]]], {}, {"a": {"b": 1}}, [1] * 50, "float16", "llama", "bert", "mamba",
]  # fmt: skip


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Inside, work that takes longer fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged_json(document: Any, chance: random.Random) -> Any:
    """A document with one value, somewhere in it, gone, doubled or replaced."""
    if isinstance(document, dict) and document:
        key = chance.choice(sorted(document))
        if isinstance(document[key], (dict, list)) and document[key] and chance.random() < 0.6:
            return {**document, key: damaged_json(document[key], chance)}
        if chance.random() < 0.2:
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: chance.choice(JUNK)}
    if isinstance(document, list) and document:
        place = chance.randrange(len(document))
        return [*document[:place], damaged_json(document[place], chance), *document[place + 1 :]]
    return chance.choice(JUNK)


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """Content that is cut, or has some bytes changed."""
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 3, 30])):
        changed[chance.randrange(min(len(changed), 4000))] = chance.randrange(256)
    return bytes(changed)


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one or two things in a model folder; returns what."""
    done = []
    for _ in range(chance.choice([1, 1, 2])):
        kind = chance.choice(["config", "config", "header", "header", "tokenizer", "bytes", "file", "index"])
        names = [path.name for path in folder.iterdir()]
        path = folder / "config.json"
        if kind == "tokenizer":
            path = folder / chance.choice(
                ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
            )
        elif kind in ("bytes", "file"):
            path = folder / chance.choice(names)
        if not path.exists():
            continue
        if kind == "header" and (folder / WEIGHTS).exists():
            with contextlib.suppress(ValueError, struct.error):
                header, data = header_of(folder / WEIGHTS)
                text = json.dumps(damaged_json(header, chance)).encode()
                (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
        elif kind == "index":
            values = [WEIGHTS, "../x.safetensors", 5, None, "gone.safetensors"]
            document = {"weight_map": {f"model.{i}": chance.choice(values) for i in range(3)}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(damaged_json(document, chance)))
            if (folder / WEIGHTS).exists() and chance.random() < 0.7:
                (folder / WEIGHTS).rename(folder / "a.safetensors")
        elif kind in ("config", "tokenizer"):
            with contextlib.suppress(ValueError):
                path.write_text(json.dumps(damaged_json(json.loads(path.read_text()), chance)))
        elif kind == "bytes":
            path.write_bytes(damaged_bytes(path.read_bytes(), chance))
        elif chance.random() < 0.5:
            path.unlink()
        else:
            path.write_bytes(b"")
        done.append(f"{kind} {path.name}")
    return ", ".join(done)


def outcome(action: Any, what: str) -> str:
    """`taken`, or `refused` where one line says why; all else is a failure of the test."""
    try:
        with limited(LIMIT_S):
            action()
    except InputError as refusal:
        message = str(refusal)
        assert "\n" not in message and len(message) < 1200 and ": expected " in message, (what, message)
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return "taken"


@pytest.mark.parametrize("part", range(4))
def test_no_damaged_model_folder_ends_in_a_traceback_or_hangs(
    part: int, tiny_model: Path, tmp_path: Path
) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(part, FOLDERS, 4):
        folder = tmp_path / f"model-{seed}"
        shutil.copytree(tiny_model, folder)
        what = f"seed {seed}: {damage(folder, random.Random(seed))}"
        outcomes[outcome(lambda folder=folder: inspect_folder(folder), what)] += 1
        outcome(lambda folder=folder: open_tensors(base_place(str(folder))), f"snr, {what}")
        outcome(lambda folder=folder: base_digest(folder), f"digest, {what}")
        settings = parse({"model": {"base_model": str(folder)}})
        if seed % 3:  # What plan does besides is worth no more time.
            shutil.rmtree(folder)
            continue
        outcome(
            lambda folder=folder, given=settings: planned_for(base_place(str(folder)), given, 0),
            f"plan, {what}",
        )
        shutil.rmtree(folder)
    assert outcomes["refused"] > outcomes["taken"] > 0, outcomes
