"""What retraining decides before it trains: whether something changed, and where to start."""

import json
from pathlib import Path

import pytest
from spectraqlora.artifacts import RankMap
from spectraqlora.errors import InputError
from spectraqlora.settings import DataSettings, Settings
from spectraqlora.steps.detect_changes.changes import changed_since_champion, source_digest
from spectraqlora.steps.start_point.champion import start_from
from spectraqlora.tracking.registry import Version
from spectraqlora_pipelines.dags.catalogue import recipe

from tests.unit.results import evaluation


def version(number: int, source: str, settings: str = "recipe", *aliases: str, **tags: str) -> Version:
    known = {"source_digest": source, "recipe_digest": settings, **tags}
    return Version("model", number, "run", known, aliases)


def test_without_a_champion_there_is_something_to_train() -> None:
    assert changed_since_champion("d1", "recipe", []).changed


def test_the_champions_own_data_and_settings_are_nothing_new() -> None:
    found = changed_since_champion("d1", "recipe", [version(2, "d1", "recipe", "champion"), version(1, "d0")])
    assert not found.changed and "version 2" in found.reason


def test_data_that_a_rejected_version_was_made_of_is_not_tried_again() -> None:
    rejected = version(3, "d2", **{"promotion.decision": "not promoted"})
    found = changed_since_champion("d2", "recipe", [rejected, version(2, "d1", "recipe", "champion")])
    assert not found.changed and "version 3" in found.reason and "not promoted" in found.reason


def test_new_data_and_new_settings_are_told_apart() -> None:
    champion = version(2, "d1", "recipe", "champion")
    assert "data changed" in changed_since_champion("d2", "recipe", [champion]).reason
    assert "settings changed" in changed_since_champion("d1", "other", [champion]).reason


def test_the_digest_follows_the_content_of_a_file_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    first = [source_digest(DataSettings(source=str(place))) for place in (path, tmp_path)]
    assert first == [source_digest(DataSettings(source=str(place))) for place in (path, tmp_path)]
    path.write_text("{}\n{}\n")
    second = [source_digest(DataSettings(source=str(place))) for place in (path, tmp_path)]
    assert not set(first) & set(second)
    with pytest.raises(InputError, match=r"data\.source"):
        source_digest(DataSettings(source=str(tmp_path / "none.jsonl")))


def test_the_digest_of_several_sources_follows_each_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    parts = [{"source": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    settings = DataSettings.model_validate({"sources": parts})
    first = source_digest(settings).split()
    assert len(first) == 2 and first[0] == source_digest(DataSettings(source=parts[0]["source"]))
    (tmp_path / "b.jsonl").write_text("{}\n{}\n")
    second = source_digest(settings).split()
    assert second[0] == first[0] and second[1] != first[1]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"data\.sources\[1\]: .*b\.jsonl"):
        source_digest(settings)


def test_where_several_sources_are_is_no_part_of_the_recipe_and_their_weights_are() -> None:
    def of(*parts: tuple[str, float]) -> str:
        sources = [{"source": name, "weight": weight} for name, weight in parts]
        return recipe(Settings.model_validate({"data": {"sources": sources}}))

    assert of(("a", 1), ("b", 2)) == of(("c", 1), ("d", 2)) != of(("a", 2), ("b", 2))


def test_the_recipe_is_what_shapes_the_model_and_nothing_else() -> None:
    plain = recipe(Settings())
    same = Settings.model_validate(
        {"promote": {"margin": 0.5}, "data": {"source": "other"}, "methods": "qlora"}
    )
    assert recipe(same) == plain
    for values in (
        {"seed": 1},
        {"train": {"max_steps": 3}},
        {"retrain": {"start": "champion"}},
        {"rounds": 2},
    ):
        assert recipe(Settings.model_validate(values)) != plain


def _fresh(folder: Path, **changes: object) -> Path:
    ranks = evaluation("hybrid", [1.0], 10).rounds[0].rank_map
    ranks.model_copy(update=changes).write(folder)
    (folder / "a_init.safetensors").write_bytes(b"start")
    return folder


def test_training_starts_from_a_champion_of_the_same_method_and_base(tmp_path: Path) -> None:
    champion = _fresh(tmp_path / "champion", round=2)
    (champion / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter").mkdir()
    said = start_from((3, champion), _fresh(tmp_path / "fresh"), tmp_path / "ranks", tmp_path / "adapter")
    assert "version 3" in said and said.startswith("from the adapter")
    assert RankMap.read(tmp_path / "ranks").round == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("changes", [{"method": "alors"}, {"base_digest": "other"}, None])
def test_training_starts_from_the_base_where_the_champion_does_not_fit(
    changes: dict | None, tmp_path: Path
) -> None:
    champion = None if changes is None else (3, _fresh(tmp_path / "champion", **changes))
    (tmp_path / "adapter").mkdir()
    said = start_from(champion, _fresh(tmp_path / "fresh"), tmp_path / "ranks", tmp_path / "adapter")
    assert said.startswith("from the base")
    # Object storage and the docker runner keep no empty folder.
    (only,) = (tmp_path / "adapter").iterdir()
    assert only.name == "none.txt" and only.read_text().startswith("training starts from the base: ")
    assert (tmp_path / "ranks" / "a_init.safetensors").exists()
    assert RankMap.read(tmp_path / "ranks").method == "hybrid"


def test_a_champion_of_version_0_1_0_does_not_stop_retraining(tmp_path: Path) -> None:
    champion = _fresh(tmp_path / "champion")
    document = json.loads((champion / "rank_map.json").read_text())
    (champion / "rank_map.json").write_text(json.dumps(document | {"schema_version": 1}))
    said = start_from((3, champion), _fresh(tmp_path / "fresh"), tmp_path / "ranks", tmp_path / "adapter")
    assert said == (
        "from the base: the rank map of the champion, version 3, comes from another version of this project"
    )
