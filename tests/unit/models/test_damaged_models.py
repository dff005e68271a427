"""A hundred damaged model folders: run, snr and plan say in one line what is wrong, or take them; none hangs.

Of each what `run` asks before it starts is asked; of every fourth one also what `snr` and `plan` do, and, where it is taken,
the first step that reads its weights.
"""

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
from spectraqlora.models.inspection import open_tensors
from spectraqlora.places import base_digest, base_place, data_place
from spectraqlora.settings import ModelSettings, parse
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora_pipelines.cli.plan import planned_for
from spectraqlora_pipelines.cli.snr import snr
from spectraqlora_pipelines.local.preflight import check

from tests.models import WEIGHTS, header_of

FOLDERS, MORE_FOLDERS = 100, int(os.environ.get("SPECTRAQLORA_DAMAGED", "2000"))
"""In every test run, and under the mark `soak`."""
LIMIT_S = 60
KINDS = (
    "config", "config", "config", "header", "header", "names", "weights", "tokenizer", "tokenizer", "bytes", "file",
    "index", "quantization", "template",
)  # fmt: skip
METHODS: list[Any] = [
    "bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq", "", None, 4, {"load_in_4bit": True},
]  # fmt: skip
TEMPLATES = [
    "{% for %}",
    "{{ messages[0].x.y }}",
    "{{ 1 / 0 }}",
    "",
    "{% for i in range(10**9) %}x{% endfor %}",
]
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
        kind = chance.choice(KINDS)
        path = folder / "config.json"
        if kind == "tokenizer":
            path = folder / chance.choice(
                ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
            )
        elif kind in ("bytes", "file"):
            path = chance.choice(sorted(folder.iterdir()))
        elif kind in ("header", "names", "weights"):
            path = folder / WEIGHTS
        if not path.is_file():
            continue
        with contextlib.suppress(ValueError, struct.error):  # What is damaged already.
            _damage(kind, path, chance)
            done.append(f"{kind} {path.name}")
    return ", ".join(done)


def _damage(kind: str, path: Path, chance: random.Random) -> None:
    folder = path.parent
    if kind in ("header", "names"):
        header, data = header_of(path)
        text = json.dumps((damaged_json if kind == "header" else renamed)(header, chance)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    elif kind == "weights":
        content = bytearray(path.read_bytes())
        start = chance.randrange(len(content) // 2, len(content) - 8) & ~3
        content[start : start + 4] = struct.pack("<f", chance.choice([float("nan"), float("inf"), 1e38, 0.0]))
        path.write_bytes(content)
    elif kind in ("config", "tokenizer"):
        path.write_text(json.dumps(damaged_json(json.loads(path.read_text()), chance)))
    elif kind == "quantization":
        method = chance.choice(METHODS)
        settings = method if isinstance(method, dict) else {"quant_method": method, "bits": 4}
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    elif kind == "template":
        (folder / "chat_template.jinja").write_text(chance.choice(TEMPLATES))
    elif kind == "index":
        values = [WEIGHTS, "../x.safetensors", 5, None, "gone.safetensors"]
        document = {"weight_map": {f"model.{i}": chance.choice(values) for i in range(3)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(damaged_json(document, chance)))
        if (folder / WEIGHTS).exists() and chance.random() < 0.7:
            (folder / WEIGHTS).rename(folder / "a.safetensors")
    elif kind == "bytes":
        path.write_bytes(damaged_bytes(path.read_bytes(), chance))
    else:
        path.unlink()
        if chance.random() < 0.4:
            path.write_bytes(b"")
        elif chance.random() < 0.5:
            path.mkdir()


def renamed(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A header in which a tensor has another's name, or one of no part of the model."""
    one, other = chance.sample(sorted(header), 2)
    if chance.random() < 0.5:
        return {**header, one: header[other], other: header[one]}
    return {
        (one.replace("layers", "blocks") + ".x" if name == one else name): at for name, at in header.items()
    }


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


def try_folders(seeds: range, model: Path, rows: Path, work: Path) -> None:
    """Damage a folder for each seed, and let the commands have it."""
    planned_for(
        base_place(str(model)), parse({"model": {"base_model": str(model)}}), 0
    )  # Imports take their time.
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        folder = work / f"model-{seed}"
        shutil.copytree(model, folder)
        what = f"seed {seed}: {damage(folder, random.Random(seed))}"
        base, source = base_place(str(folder)), data_place(str(rows))
        settings = parse({"model": {"base_model": str(folder)}, "data": {"source": str(rows)}})
        asked = outcome(lambda given=settings, at=base, data=source: check(given, at, [data]), what)
        outcomes[asked] += 1
        outcome(lambda at=base: open_tensors(at), f"snr, {what}")
        outcome(lambda at=folder: base_digest(at), f"digest, {what}")
        if seed % 4 == 0:
            outcome(lambda at=folder: snr(str(at)), f"snr, {what}")
            outcome(lambda at=base, given=settings: planned_for(at, given, 0), f"plan, {what}")
            if asked == "taken":
                taken = ModelSettings(base_model=str(folder))
                outcome(lambda given=taken: quantize(given, work / "4bit", work / "outline"), f"run, {what}")
        for made in (folder, work / "4bit", work / "outline"):
            shutil.rmtree(made, ignore_errors=True)
    assert outcomes["refused"] > outcomes["taken"] > 0, outcomes


@pytest.mark.parametrize("part", range(4))
def test_no_damaged_model_folder_ends_in_a_traceback_or_hangs(
    part: int, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    try_folders(range(part * FOLDERS // 4, (part + 1) * FOLDERS // 4), tiny_model, tiny_rows, tmp_path)


@pytest.mark.soak
def test_no_other_damage_does_either(tiny_model: Path, tiny_rows: Path, tmp_path: Path) -> None:
    try_folders(range(FOLDERS, FOLDERS + MORE_FOLDERS), tiny_model, tiny_rows, tmp_path)
