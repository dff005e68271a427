"""Registered models load with MLflow alone, in both forms, and are scored again on other rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from spectraqlora.artifacts import MergedModel
from spectraqlora.scoring.held_out import read_held_out, read_test_rows
from spectraqlora.settings import EvaluateSettings, PromoteSettings, TrackingSettings
from spectraqlora.steps.promote.promotion import Promotion
from spectraqlora.steps.promote.rescore import guard_perplexity, rescore
from spectraqlora.steps.register.register import Inputs, register
from spectraqlora.tracking.registered_model import download_model, load_model
from spectraqlora.tracking.registry import ADAPTER, HELD_OUT, Registry
from spectraqlora.tracking.runs import Tracker

pytestmark = pytest.mark.e2e
LOAD = """
import sys
sys.modules["spectraqlora"] = None
import mlflow
uri, name = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_registry_uri(uri)
pipe = mlflow.transformers.load_model(f"models:/{name}@champion")
text = pipe("Question: Where does anna live?\\nAnswer:", max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert len(text) > len("Question: Where does anna live?\\nAnswer:"), text
info = mlflow.models.get_model_info(f"models:/{name}@champion")
assert info.signature.inputs.to_dict() and info.signature.outputs.to_dict()
assert mlflow.pyfunc.load_model(f"models:/{name}@champion").input_example
"""


def _register(uri: str, name: str, exported: Path, rows: Path, key: str, form: str, loss: float = 1.0) -> int:
    settings = TrackingSettings(uri=uri, registered_model=name, registered_form=form)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        winner = Path(scratch) / "winner"
        shutil.copytree(exported, winner)
        losses = {"verified_eval_loss": loss, "eval_loss_original": loss, "test_loss": loss}
        MergedModel.read(winner).model_copy(update=losses).write(winner)
        inputs = Inputs(rows=rows, winner=winner, exported=winner)
        return register(Tracker(settings, key), inputs, {})[1]


def _gate(uri: str, name: str, version: int, **settings: object) -> Promotion:
    registry = Registry(TrackingSettings(uri=uri, registered_model=name))
    section = PromoteSettings.model_validate(settings)
    return Promotion(registry, registry.version(version), section, EvaluateSettings(accuracy_rows=2))


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_champion_generates_text_with_mlflow_alone(
    form: str, exported: Path, prepared: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    version = _register(uri, "speaker", exported, prepared, "run-1", form)
    assert _register(uri, "speaker", exported, prepared, "run-1", form) == version
    assert _gate(uri, "speaker", version).run().promoted
    subprocess.run([sys.executable, "-c", LOAD, uri, "speaker"], check=True, timeout=300)
    registry = Registry(TrackingSettings(uri=uri, registered_model="speaker"))
    champion = registry.version("champion")
    for tag in ("eval_digest", "merged_digest", "base_digest", "data_digest", "tokenizer_digest"):
        assert champion.tags[tag]
    assert champion.run_id == Tracker(TrackingSettings(uri=uri), "run-1").pipeline_run()
    folder = download_model(registry.settings, champion, tmp_path)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    merged_size = sum(path.stat().st_size for path in (exported / "merged").rglob("*.safetensors"))
    assert (size < 0.5 * merged_size) == (form == "adapter"), "the adapter form refers to the base"
    rows, answers = read_held_out(registry.download(champion, HELD_OUT, tmp_path))
    again = rescore(*load_model(folder), rows, answers, EvaluateSettings(accuracy_rows=2))
    assert again["merged_eval_loss"] > 0 and "accuracy" in again
    adapter = registry.download(champion, ADAPTER, tmp_path)
    assert (adapter / "adapter_model.safetensors").exists() and (adapter / "rank_map.json").exists()


def test_both_are_scored_again_where_their_rows_differ_and_general_text_guards(
    exported: Path, prepared: Path, outline: Path, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    from spectraqlora.settings import DataSettings
    from spectraqlora.steps.prepare_data.prepare import prepare

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    plain = tmp_path / "plain"
    shutil.copytree(exported, plain)
    shutil.rmtree(plain / "merged")
    shutil.copytree(tiny_model, plain / "merged")
    other = tmp_path / "other"
    prepare(DataSettings(source=str(tiny_rows)), outline, 2, other)
    # The numbers that were logged lie: only scoring again can tell which model is better.
    first = _register(uri, "again", exported, prepared, "run-1", "merged", loss=0.1)
    second = _register(uri, "again", plain, other, "run-2", "merged", loss=9.0)
    assert _gate(uri, "again", first).run().promoted
    outcome = _gate(uri, "again", second).run(dry_run=True)
    assert "again" in outcome.scored
    registry = Registry(TrackingSettings(uri=uri, registered_model="again"))
    kept = registry.download(registry.version(second), HELD_OUT, tmp_path / "rows")
    rows, answers = read_held_out(kept)
    assert registry.version(second).tags["test_digest"] != registry.version(first).tags["test_digest"]
    for version, numbers in ((second, outcome.challenger), (first, outcome.champion)):
        folder = download_model(registry.settings, registry.version(version), tmp_path / str(version))
        model, tokenizer = load_model(folder)
        measured = rescore(
            model, tokenizer, rows, answers, EvaluateSettings(accuracy_rows=2), read_test_rows(kept)
        )
        assert numbers["merged_test_loss"] == pytest.approx(measured["merged_test_loss"], rel=1e-5)
        assert numbers["merged_test_loss"] != pytest.approx(measured["merged_eval_loss"], rel=1e-5)
    better = outcome.challenger["merged_test_loss"] < outcome.champion["merged_test_loss"]
    assert outcome.promoted == better

    text = tmp_path / "general.txt"
    text.write_text("anna lives in oslo . bo has a cat . " * 40)
    given = {"guard_data": str(text), "guard_rows": 3}
    guarded = _gate(uri, "again", second, **given, guard_bound=100.0).run(dry_run=True)
    perplexities = [numbers["guard_perplexity"] for numbers in (guarded.challenger, guarded.champion)]
    model, tokenizer = load_model(tmp_path / str(second))
    assert perplexities[0] == pytest.approx(guard_perplexity(model, tokenizer, str(text), 3, 16), rel=1e-4)
    assert perplexities[0] != perplexities[1]
    assert "guard_digest" not in registry.version(second).tags, "a dry run writes nothing"
    _gate(uri, "again", second, **given, guard_bound=100.0).run()
    for version, measured in zip((second, first), perplexities, strict=True):
        tags = registry.version(version).tags
        assert tags["guard_digest"].endswith(":3")
        assert float(tags["guard_perplexity"]) == pytest.approx(measured, rel=1e-6)
