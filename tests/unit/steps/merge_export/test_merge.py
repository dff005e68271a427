"""What merge-export writes: the base's type, files that others may read, a warning where the merge lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from spectraqlora.artifacts import Evaluation, MergedModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import link_or_copy
from spectraqlora.models import adapters
from spectraqlora.models.loading import load_four_bit, load_plain
from spectraqlora.models.tensors import LocalTensors
from spectraqlora.scoring.batches import load_rows
from spectraqlora.scoring.loss import score
from spectraqlora.settings import EvaluateSettings, ModelSettings
from spectraqlora.steps.merge_export.merge import Inputs, make_savable, merge_export, merge_warning
from spectraqlora.steps.quantize_load.quantize import quantize

from tests.measured import with_test_rows
from tests.models import change_weights, copied
from tests.unit.models.test_adapters import Q0, randomize, rank_map
from tests.unit.results import evaluation


@pytest.fixture(scope="module")
def winner(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base, its 4-bit model, and a winner on it, next to each other."""
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("merge")
    copied(tiny_model, work / "base")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(work / "base")
    quantize(ModelSettings(base_model=str(work / "base")), work / "four_bit", work / "outline")
    wrapped = adapters.attach(load_four_bit(work / "four_bit")[0], rank_map(work / "four_bit", {Q0: 4}))
    randomize(wrapped)
    adapters.save(wrapped, work / "winner" / "adapter", "base")
    evaluation("alors", [1.0, 2.0], 100).write(work / "winner")
    return work


def export(work: Path, prepared: Path, output: Path) -> MergedModel:
    output.mkdir()
    return merge_export(Inputs(work / "four_bit", prepared, work / "winner"), EvaluateSettings(), output)


def test_the_merged_model_has_the_bases_type_whatever_was_computed_in(
    winner: Path, prepared: Path, tmp_path: Path
) -> None:
    result = export(winner, prepared, tmp_path / "exported")
    merged = tmp_path / "exported" / "merged"
    assert (
        result.dtype == "bfloat16" and json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    )
    base, written = LocalTensors(winner / "base"), LocalTensors(merged)
    assert {n: e.dtype for n, e in written.stored.items()} == {n: e.dtype for n, e in base.stored.items()}
    changed = [name for name in base.names() if not torch.equal(base.load(name), written.load(name))]
    assert changed == [f"{Q0}.weight"] or result.merged_into == "quantized"
    # What was scored is what is written: numbers rounded as the files have them.
    scored = {"original": result.eval_loss_original, "quantized": result.eval_loss_quantized}[
        result.merged_into
    ]
    assert result.verified_eval_loss == pytest.approx(scored, rel=1e-5)


def test_only_what_is_exported_is_scored_on_the_test_rows(
    winner: Path, prepared: Path, tmp_path: Path
) -> None:
    rows = with_test_rows(prepared, tmp_path / "rows")
    work = Path(shutil.copytree(winner, tmp_path / "work"))
    won = Evaluation.read(work / "winner").model_copy(update={"base_test_loss": 9.5})
    won.write(work / "winner")
    result = export(work, rows, tmp_path / "exported")
    model = load_plain(tmp_path / "exported" / "merged", torch.float32)
    expected = score(model, load_rows(rows, "test"), 2)
    assert (result.test_rows, result.base_test_loss) == (5, 9.5)
    assert result.test_loss == pytest.approx(expected.loss) and result.test_loss != result.verified_eval_loss
    assert result.test_loss_stderr == pytest.approx(expected.stderr)
    said = f"Test loss on 5 rows that chose nothing: {result.test_loss:.4f} ± {result.test_loss_stderr:.4f}; "
    for name in ("merged", "adapter"):
        card = (tmp_path / "exported" / name / "README.md").read_text()
        assert said + "the base's (4-bit) 9.5000." in card
    without = PreparedRows.read(rows).model_copy(update={"test_rows": 0})
    without.write(rows)
    assert export(work, rows, tmp_path / "again").test_loss is None
    assert "No test rows" in (tmp_path / "again" / "merged" / "README.md").read_text()


def test_exported_files_have_the_mode_of_new_files(winner: Path, prepared: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(winner, prepared, tmp_path / "exported")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    for name in ("merged", "adapter"):
        modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "exported" / name).iterdir()}
        assert modes == {0o640}


def test_a_merge_that_lost_what_was_trained_warns_and_says_what_to_do(
    winner: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = export(winner, prepared, tmp_path / "exported")
    # The made-up evaluation's adapter scores 1.5, far better than a random model does.
    assert result.verified_eval_loss > 1.6
    assert "worse than the adapter's, 1.5000, by more than its standard error, 0.1000" in result.warning
    assert "tracking.registered_form=adapter" in result.warning
    assert f"WARNING: {result.warning}" in capsys.readouterr().out
    for name in ("merged", "adapter"):
        assert result.warning in (tmp_path / "exported" / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("merged", "error", "warned"),
    [(1.59, 0.1, False), (1.61, 0.1, True), (1.4, 0.1, False), (1.6, math.nan, False)],
)
def test_what_chance_explains_is_no_loss(merged: float, error: float, warned: bool) -> None:
    assert bool(merge_warning(evaluation("alors", [1.0, 2.0], 100, eval_loss_stderr=error), merged)) is warned


def test_a_base_that_was_replaced_after_it_was_quantized_is_refused(
    winner: Path, prepared: Path, tmp_path: Path
) -> None:
    work = Path(shutil.copytree(winner, tmp_path / "work"))
    manifest = json.loads((work / "four_bit" / "manifest.json").read_text())
    manifest["source_path"] = str(work / "base")
    (work / "four_bit" / "manifest.json").write_text(json.dumps(manifest))
    times = (work / "base" / "model.safetensors").stat()
    change_weights(work / "base", lambda tensors: tensors[f"{Q0}.weight"].mul_(1.01))
    os.utime(work / "base" / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"the model that was quantized.*it was replaced since"):
        export(work, prepared, tmp_path / "exported")


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6, "top_p": 0.9}, {"num_beams": 1, "early_stopping": True}, {}]
)
def test_a_generation_config_that_contradicts_itself_is_saved_all_the_same(
    settings: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = copied(tiny_model, tmp_path / "model")
    document = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings}
    (folder / "generation_config.json").write_text(json.dumps(document))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [2, 5]
    make_savable(model)
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == [2, 5] and saved.do_sample is ("temperature" in settings or None)


def test_a_second_name_of_a_file_takes_no_room(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino
