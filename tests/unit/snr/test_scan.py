"""The scan itself: side by side, within its memory, from packed checkpoints, and after an interruption."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from spectraqlora.artifacts import ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_four_bit
from spectraqlora.models.modules import dequantized_weight
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.settings import SnrSettings
from spectraqlora.snr import workers
from spectraqlora.snr.journal import ScanJournal
from spectraqlora.snr.marchenko_pastur import SnrStatistics, from_singular_values, statistics
from spectraqlora.snr.scan import scan, scan_tensors
from spectraqlora.snr.table import order, read_table, top_modules, write_table
from spectraqlora.snr.workers import in_threads, measured, working_bytes
from spectraqlora.steps.snr_analyze.analyze import Inputs, analyze
from spectraqlora_pipelines.cli.snr import snr_table

from tests.architectures import ARCHITECTURES, written
from tests.benchmarks.snr import memory_bound, peak_of_scan, write_checkpoint


def stream(count: int, rows: int = 60, cols: int = 90) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices of one type with ever stronger low-rank parts."""
    generator = torch.Generator().manual_seed(3)
    for index in range(count):
        strong = torch.randn(rows, 3, generator=generator) @ torch.randn(3, cols, generator=generator)
        weight = torch.randn(rows, cols, generator=generator) + 0.1 * index * strong
        yield f"model.layers.{index}.mlp.up_proj", weight


@pytest.mark.parametrize(
    ("rows", "cols", "count", "dtype"), [(60, 90, 20, torch.float32), (1024, 1100, 8, torch.bfloat16)]
)
def test_the_selection_equals_that_of_svdvals_in_float64(
    rows: int, cols: int, count: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = {name: weight.to(dtype) for name, weight in stream(count, rows, cols)}
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    exact = pd.DataFrame(
        {
            "module": name,
            "type": "mlp.up_proj",
            "snr": exact.snr,
            "signal": exact.signal,
            "s1": exact.s1,
            "calibrated": 0.0,
        }
        for name, weight in weights.items()
        for exact in [from_singular_values(torch.linalg.svdvals(weight.double()), (rows, cols))]
    )
    exact["order"] = order(exact, "spectrum")
    found = scan(LocalTensors(tmp_path))
    for percent in (10, 25, 50, 75):
        assert top_modules(found, percent) == top_modules(exact, percent)


def test_degenerate_matrices_have_a_row_without_snr_and_are_never_selected() -> None:
    bad = [torch.zeros(8, 8), torch.ones(1, 8), torch.full((8, 8), 2.0), torch.full((8, 8), math.nan)]
    weights = [(f"model.layers.{index}.mlp.up_proj", weight) for index, weight in enumerate(bad)]
    table = scan_tensors([*weights, ("model.layers.9.mlp.up_proj", torch.randn(8, 8))])
    assert list(table["layer"]) == [0, 1, 2, 3, 9]
    assert table["snr"].isna().tolist() == [True] * 4 + [False]
    assert top_modules(table, 100) == {"model.layers.9.mlp.up_proj"}


def test_fused_experts_get_a_row_each(tmp_path: Path) -> None:
    experts = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.experts.up_proj"
    save_file({name: experts}, tmp_path / "model.safetensors")
    streamed, stored = scan_tensors([(name, experts)]), scan(LocalTensors(tmp_path))
    assert list(streamed["module"]) == [f"{name}[{index}]" for index in range(3)]
    assert set(streamed["type"]) == {"mlp.experts.up_proj"}
    pd.testing.assert_frame_equal(streamed, stored)


@pytest.mark.parametrize(
    ("name", "experts"),
    [("granite-4", 4 * 2 * 2), ("qwen3-next", 4 * 3 * 2), ("jamba", 2 * 3), ("falcon-h1", 0), ("mamba-2", 0)],
)
def test_convolutions_routers_and_what_a_state_space_layer_stores_are_no_matrices_of_the_table(
    name: str, experts: int, tmp_path: Path
) -> None:
    checkpoint = LocalTensors(written(ARCHITECTURES[name], tmp_path))
    table = scan(checkpoint)
    stored = table["module"].str.partition("[")[0]
    sides = {tensor.removesuffix(".weight"): checkpoint.shape(tensor) for tensor in checkpoint.names()}
    assert not table["type"].str.contains(r"conv|router|\bgate$|shared_expert_gate|A_log|bias|norm").any()
    assert table["type"].str.contains(r"experts\.|_moe\.").sum() == experts
    assert all(
        (row.rows, row.cols) == sides[module][-2:]
        for row, module in zip(table.itertuples(), stored, strict=True)
    )


def test_a_table_without_one_finite_value_is_written_and_drawn(tmp_path: Path) -> None:
    table = scan_tensors([("model.layers.0.mlp.up_proj", torch.zeros(8, 8))])
    write_table(table, tmp_path)
    assert read_table(tmp_path)["snr"].isna().all() and (tmp_path / "heatmap.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_gives_what_the_cpu_gives() -> None:
    named = list(stream(20, 512, 768))
    cpu = {result.module: result.statistics for result in in_threads(named, 2**30, 2)}
    gpu = {result.module: result.statistics for result in measured(named)}
    for name, found in cpu.items():
        assert gpu[name].snr == pytest.approx(found.snr, rel=1e-6)
        assert gpu[name].above == found.above


@pytest.mark.parametrize("room", [1, 2])
def test_no_more_matrices_are_held_than_the_budget_has_room_for(room: int) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, weight in stream(12):
            most = max(most, sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(weight))
            yield name, weight
            del weight

    threads = torch.get_num_threads()
    try:
        cost = working_bytes(torch.empty(60, 90))
        assert len(list(in_threads(weights(), room * cost, 4))) == 12
    finally:
        torch.set_num_threads(threads)
    assert most <= room + 1  # and the one that waits for room
    assert all(ref() is None for ref in alive)


def test_peak_memory_of_a_scan_does_not_follow_the_size_of_the_checkpoint() -> None:
    layer = [(128, 32768)] * 7
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), 2**30, layer, shard_size=2**29)
        found = peak_of_scan(Path(name))
    assert found["matrices"] == 133
    assert found["peak"] < memory_bound(layer) < 2**30


def test_a_packed_checkpoint_is_scanned_as_the_loaded_model_would_be(
    quantized: Path, outline: Path, tmp_path: Path
) -> None:
    model, manifest = load_four_bit(quantized)
    named = dict(model.named_modules())
    checkpoint = LocalTensors(quantized / "model")
    for info in manifest.modules:
        weight = checkpoint.load(f"{info.module}.weight").float()
        assert torch.equal(weight, dequantized_weight(named[info.module]).cpu())
        assert checkpoint.shape(f"{info.module}.weight") == weight.shape
    expected = scan_tensors(
        ((info.module, dequantized_weight(named[info.module]).cpu()) for info in manifest.modules),
        "quantized",
    )
    analyze(Inputs(outline, quantized), SnrSettings(source="quantized"), tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path), expected)
    assert {row.module for row in scan(checkpoint).itertuples()} == {info.module for info in manifest.modules}


def test_the_original_is_scanned_where_the_settings_say_so(outline: Path, tmp_path: Path) -> None:
    analyze(Inputs(outline), SnrSettings(source="original"), tmp_path)
    table = read_table(tmp_path)
    assert set(table["source"]) == {"original"}
    source = Path(ModelOutline.read(outline).source_path)
    everything = scan(LocalTensors(source))
    pd.testing.assert_frame_equal(
        table.sort_values("module", ignore_index=True), everything.sort_values("module", ignore_index=True)
    )


def test_four_bit_weights_are_measured_only_where_the_pipeline_hands_them_over(
    outline: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        analyze(Inputs(outline), SnrSettings(source="quantized"), tmp_path)
    assert str(refused.value).startswith("snr.source: 'quantized': expected original, or a pipeline compiled")


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """24 matrices of about 0.05 seconds each on one core."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"{name}.weight": weight.bfloat16() for name, weight in stream(24, 512, 1024)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_killed_scan_resumes_where_it_was(slow_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "snr.parquet"
    partial = tmp_path / "snr.parquet.partial.jsonl"
    command = [sys.executable, "-m", "spectraqlora_pipelines.cli", "snr", str(slow_model)]
    command += ["--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_text().count("\n") < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not output.exists()
    with open(partial, "a") as stream_:
        stream_.write('\n{"source": "cut sho')

    checkpoint = LocalTensors(slow_model)
    finished = ScanJournal(partial, checkpoint.digest)
    kept = len(finished.rows)
    assert 3 <= kept < 24
    reports: list[int] = []
    table = scan(checkpoint, None, lambda done, total, module: reports.append(done), finished)
    assert reports == list(range(kept, 25))
    pd.testing.assert_frame_equal(table, scan(checkpoint))

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pd.testing.assert_frame_equal(pd.read_parquet(output), table)
    assert not partial.exists()


def test_an_interrupted_step_resumes_where_it_was(
    outline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Interrupted(Exception):
        pass

    def stop(weight: torch.Tensor) -> SnrStatistics:
        if len(done) == 5:
            raise Interrupted
        done.append(weight)
        return statistics(weight)

    done: list[torch.Tensor] = []
    monkeypatch.setattr(workers, "statistics", stop)
    with pytest.raises(Interrupted):
        analyze(Inputs(outline), SnrSettings(), tmp_path / "first")
    (kept,) = (tmp_path / "cache" / "spectraqlora" / "snr").iterdir()
    rows = kept.read_text().count('"module"')
    assert 1 <= rows <= 5
    done.clear()
    monkeypatch.setattr(workers, "statistics", lambda weight: done.append(weight) or statistics(weight))
    analyze(Inputs(outline), SnrSettings(), tmp_path / "second")
    assert len(done) == 28 - rows
    assert not kept.exists() and len(read_table(tmp_path / "second")) == 28


def test_rows_of_another_checkpoint_are_not_used(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "model.safetensors")
        os.utime(tmp_path / "model.safetensors", ns=(seed, seed))
        digests.append(LocalTensors(tmp_path).digest)
    path = tmp_path / "rows.jsonl"
    ScanJournal(path, digests[0]).add({"module": "model.layers.0.mlp.up_proj", "snr": math.inf})
    assert ScanJournal(path, digests[0]).rows["model.layers.0.mlp.up_proj"]["snr"] == math.inf
    assert ScanJournal(path, digests[1]).rows == {}
    assert json.loads(path.read_text().strip())["source"] == digests[0]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_table_on_screen_is_complete_at_any_width(width: int) -> None:
    named = [
        (f"model.layers.{index}.{kind}", torch.randn(64, 48))
        for index in (0, 31)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    table = scan_tensors(named)
    screen = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(snr_table(table, top_modules(table, 50), 50, screen))
    text = screen.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    for row, line in zip(table.itertuples(), rows, strict=True):
        module = row.module if width == 120 else row.module.removeprefix("model.layers.")
        assert f" {module} " in line
        assert f"{row.snr:.4f}" in line
    assert ("threshold" in text) == (width == 120)


def test_the_4_bit_weights_of_another_base_are_refused(
    quantized: Path, outline: Path, tmp_path: Path
) -> None:
    document = json.loads((outline / "manifest.json").read_text()) | {"base_digest": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(
        InputError, match=r"^four_bit base_digest: '\w{12}': expected 000000000000, the base model"
    ):
        analyze(Inputs(tmp_path, quantized), SnrSettings(source="quantized"), tmp_path / "table")
    assert not (tmp_path / "table").exists()
