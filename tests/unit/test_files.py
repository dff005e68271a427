"""A folder's digest stands for its files, wherever the folder is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.files import folder_digest

OF_NO_FILES = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def snapshot(cache: Path, commit: str, weights: bytes) -> Path:
    """A model as the hub's cache has it: names that are links to blobs."""
    blobs = cache / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, content in {"config.json": b"{}", "model.safetensors": weights}.items():
        blob = blobs / f"{commit}-{name}"
        blob.write_bytes(content)
        (folder / name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_a_folder_below_a_cache_has_the_digest_of_its_files(tmp_path: Path) -> None:
    plain = folder_digest(model(tmp_path / "plain"))
    cached = folder_digest(model(tmp_path / ".cache" / "models" / "one"))
    other = folder_digest(model(tmp_path / ".cache" / "models" / "two", b"other weights"))
    assert plain == cached != other
    assert OF_NO_FILES not in (plain, other)


def test_links_of_a_hub_snapshot_count_by_their_content(tmp_path: Path) -> None:
    cache = tmp_path / ".cache" / "huggingface" / "hub" / "models--owner--name"
    first, second = snapshot(cache, "aaaa", b"weights"), snapshot(cache, "bbbb", b"other weights")
    assert folder_digest(first) == folder_digest(model(tmp_path / "plain"))
    assert folder_digest(second) == folder_digest(model(tmp_path / "other", b"other weights"))


def test_bookkeeping_inside_a_folder_does_not_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    before = folder_digest(folder)
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "model.safetensors.metadata").write_text("commit")
    assert folder_digest(folder) == before


def test_names_count_as_contents_do(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    before = folder_digest(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert folder_digest(folder) != before


@pytest.mark.parametrize("inside", ["", "empty", ".cache/file"])
def test_a_folder_without_files_has_no_digest(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if inside.endswith("file"):
        (folder / inside).parent.mkdir()
        (folder / inside).write_text("bookkeeping")
    elif inside:
        (folder / inside).mkdir()
    with pytest.raises(InputError, match="a folder with files"):
        folder_digest(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="a folder with files"):
        folder_digest(folder)
