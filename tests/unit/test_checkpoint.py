"""Model folders that must be refused."""

import json
import shutil
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.models.inspection import inspect_folder


def test_good_folders_pass(tiny_model: Path) -> None:
    inspect_folder(tiny_model)


def test_bad_folders_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / name))

    no_config = copy("a")
    (no_config / "config.json").unlink()
    no_weights = copy("b")
    (no_weights / "model.safetensors").unlink()
    pickled = copy("c")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = copy("d")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    remote = copy("e")
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    for folder, words in (
        (tmp_path / "none", "existing folder"),
        (no_config, "config.json"),
        (no_weights, "no \\*.safetensors"),
        (pickled, "save_pretrained"),
        (cut, "truncated"),
        (remote, "trust_remote_code"),
    ):
        with pytest.raises(InputError, match=words):
            inspect_folder(folder)
    assert inspect_folder(remote, trusted=True).modules
