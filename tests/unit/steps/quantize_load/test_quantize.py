"""What quantize-load says of the base model that it took."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.loading import load_tokenizer
from spectraqlora.places import base_digest, base_place
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize

from tests.hub import Hub

QUANTIZE = """
import sys
from pathlib import Path
from spectraqlora.models.loading import original_folder
from spectraqlora.settings import ModelSettings
from spectraqlora.steps.quantize_load.quantize import quantize
folder, content = Path(sys.argv[1]), sys.argv[2]
manifest = quantize(ModelSettings(base_model="tiny"), folder / "four_bit", folder / "outline", content)
print("original", original_folder(manifest))
"""


def test_a_base_that_was_replaced_since_the_run_began_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    content = base_place(str(base)).digest()
    (base / "README.md").write_text("no part of the model")
    manifest = quantize(
        ModelSettings(base_model=str(base)), tmp_path / "four_bit", tmp_path / "outline", content
    )
    assert manifest.base_digest == content == base_digest(tiny_model)
    (base / "generation_config.json").write_text('{"max_length": 7}')
    with pytest.raises(InputError, match="replaced since"):
        quantize(ModelSettings(base_model=str(base)), tmp_path / "again", tmp_path / "other", content)


def test_the_outline_has_all_but_the_weights(quantized: Path, outline: Path) -> None:
    model, light = FourBitModel.read(quantized), ModelOutline.read(outline)
    assert light.modules == model.modules and light.base_digest == model.base_digest
    names = {path.name for path in (quantized / "model").iterdir()}
    assert {path.name for path in (outline / "model").iterdir()} == {
        name for name in names if ".safetensors" not in name
    }
    assert load_tokenizer(outline / "model").get_vocab() == load_tokenizer(quantized / "model").get_vocab()


def test_a_hub_id_is_pinned_to_the_commit_that_was_quantized(tiny_model: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        first = hub.publish("models", "legacy/tiny", tiny_model)
        changed = tmp_path / "changed"
        shutil.copytree(tiny_model, changed)
        (changed / "generation_config.json").write_text('{"max_length": 7}')
        second = hub.publish("models", "legacy/tiny", changed)
        path = os.pathsep.join(sys.path)
        for content, commit, source in ((first, first, tiny_model), ("", second, changed)):
            folder = tmp_path / f"of-{commit}"
            done = subprocess.run(
                [sys.executable, "-c", QUANTIZE, str(folder), content],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": path, **hub.environment(tmp_path / "home")},
            )
            manifest = FourBitModel.read(folder / "four_bit")
            assert (manifest.source, manifest.revision) == ("tiny", commit)
            assert manifest.base_digest == base_digest(source)
            original = Path(done.stdout.rpartition("original ")[2].strip())
            assert original.name == commit and original == Path(manifest.source_path)
