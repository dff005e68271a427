"""Settings: refused with key, value and expectation."""

from collections.abc import Callable
from pathlib import Path

import pytest
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import check_methods
from spectraqlora.settings import (
    PRESETS,
    RENAMED,
    EvaluateSettings,
    Settings,
    parse,
    preset,
    reference,
    with_overrides,
)
from spectraqlora_pipelines.cli.options import load_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"max_step": 1}}, ["train.max_step", "known setting"]),
        ({"train": {"max_steps": "many"}}, ["train.max_steps", "many", "integer"]),
        ({"select": {"percent": 120}}, ["select.percent", "120", "100"]),
        ({"select": {"percent": 0}}, ["select.percent", "0"]),
        ({"methods": "qlora,Magic!"}, ["methods.1", "Magic!", "a method's name"]),
        ({"retrain": {"method": "a" * 41}}, ["retrain.method", "aaa", "a method's name"]),
        ({"methods": "qlora,qlora"}, ["methods", "each named once"]),
        ({"data": {"prompt_template": "x"}}, ["data.prompt_template", "{prompt}"]),
        (
            {"data": {"sources": [{"source": "a", "weight": 1}, {"source": "b"}]}},
            ["data.sources", "a weight for"],
        ),
        ({"data": {"sources": [{"source": "a", "weight": 0}]}}, ["data.sources.0.weight", "0"]),
        (
            {"data": {"source": "c", "sources": [{"source": "a"}]}},
            ["data.sources", "data.source (c)", "not both"],
        ),
        ({"tracking": {"registered_model": "a/b"}}, ["tracking.registered_model", "a/b"]),
        (
            {"tracking": {"uri": "http://me:secret@host"}},
            ["tracking.uri", "***@host", "MLFLOW_TRACKING_USERNAME"],
        ),
        ({"promote": {"guards": {"accuracy": -1}}}, ["promote.guards.accuracy", "-1"]),
        ({"retrain": {"start": "middle"}}, ["retrain.start", "middle", "champion"]),
    ],
)
def test_bad_settings_name_the_key_the_value_and_what_was_expected(values: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse(values)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: parse({"evaluate": {"energy": 0.9}}),
        lambda: parse(with_overrides({}, ["evaluate.energy=0.9"])),
        # What a step is handed by a pipeline that was compiled before.
        lambda: EvaluateSettings(energy=0.9),
    ],
)
def test_a_renamed_setting_is_refused_with_its_new_name(refuse: Callable[[], object]) -> None:
    with pytest.raises(InputError) as caught:
        refuse()
    assert str(caught.value) == "evaluate.energy: '0.9': expected its new name, evaluate.update_energy"


def test_every_renamed_setting_is_gone_and_its_new_name_is_known() -> None:
    known = {key for key, _, _ in reference()}
    assert RENAMED and set(RENAMED.values()) <= known and not set(RENAMED) & known


def test_overrides_reach_nested_keys_and_leave_the_input_alone() -> None:
    values = {"train": {"max_steps": 5}}
    changed = parse(with_overrides(values, ["train.learning_rate=1e-3", "select.gradient_init=off"]))
    assert (changed.train.learning_rate, changed.train.max_steps) == (1e-3, 5)
    assert changed.select.gradient_init == "off"
    assert values == {"train": {"max_steps": 5}}


def test_an_assignment_without_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"section\.key=value"):
        with_overrides({}, ["train.max_steps"])


def test_every_setting_is_documented() -> None:
    assert len(reference()) > 40
    assert all(text for _, _, text in reference())
    assert Settings().methods == ("qlora", "hybrid", "alors", "sgm", "qlora_half")


def test_a_preset_is_below_a_file_options_and_assignments(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("train: {max_steps: 7, learning_rate: 0.01}\nselect: {rank: 4}\n")
    plain = load_settings(None, {}, [], "seed")
    assert (plain.select.signal, plain.rounds) == ("spectrum", 2)
    train = plain.train
    assert (train.learning_rate, train.optimizer, train.gradient_checkpointing) == (2e-4, "adamw", "on")
    assert load_settings(None, {}, []) == load_settings(None, {}, [], "default") == Settings()
    mixed = load_settings(config, {"rounds": 3, "seed": None}, ["select.signal=combined"], "seed")
    assert (mixed.train.max_steps, mixed.train.learning_rate, mixed.select.rank) == (7, 0.01, 4)
    assert (mixed.train.gradient_checkpointing, mixed.rounds, mixed.select.signal) == ("on", 3, "combined")
    assert load_settings(None, {}, [], "seed") == plain, "a preset is not changed by what was set above it"


def test_every_preset_is_made_of_settings_that_there_are() -> None:
    for name in PRESETS:
        assert check_methods(parse(preset(name)))
    with pytest.raises(InputError, match=r"^--preset: 'seeds': expected default or seed$"):
        load_settings(None, {}, [], "seeds")
