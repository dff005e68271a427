"""Settings: refused with key, value and expectation."""

from collections.abc import Callable

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import RENAMED, EvaluateSettings, Settings, parse, reference, with_overrides


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
    assert Settings().methods == ("qlora", "hybrid", "alors", "sgm")
