"""Settings: refused with key, value and expectation."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import Settings, parse, reference, with_overrides


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"max_step": 1}}, ["train.max_step", "known setting"]),
        ({"train": {"max_steps": "many"}}, ["train.max_steps", "many", "integer"]),
        ({"select": {"percent": 120}}, ["select.percent", "120", "100"]),
        ({"select": {"percent": 0}}, ["select.percent", "0"]),
        ({"methods": "qlora,magic"}, ["methods", "magic", "hybrid"]),
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
