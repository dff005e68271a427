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
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.models.inspection import open_tensors
from spectraqlora.places import base_digest, base_place, data_place
from spectraqlora.settings import ModelSettings, parse
from spectraqlora.steps.quantize_load.quantize import quantize
from spectraqlora_pipelines.cli.plan import planned_for
from spectraqlora_pipelines.cli.snr import snr
from spectraqlora_pipelines.local.preflight import check

from tests.damage import damaged_bytes, damaged_json, outcome
from tests.models import WEIGHTS, header_of

FOLDERS, MORE_FOLDERS = 100, int(os.environ.get("SPECTRAQLORA_DAMAGED", "2000"))
"""In every test run, and under the mark `soak`."""
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
