"""The gate's decisions, from numbers alone."""

import math

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import PromoteSettings
from spectraqlora.steps.promote.gate import decide


def decision(challenger: dict, champion: dict | None, **settings: object) -> bool:
    return decide(challenger, champion, PromoteSettings.model_validate(settings)).promote


def loss(value: float, **others: float) -> dict[str, float]:
    return {"merged_eval_loss": value, **others}


def test_the_first_version_becomes_champion() -> None:
    assert decision(loss(2.0), None)


@pytest.mark.parametrize(
    ("before", "now", "margin", "promoted"),
    [(2.0, 1.9, 0.0, True), (2.0, 2.0, 0.0, False), (2.0, 2.1, 0.0, False), (2.0, 1.9, 0.2, False), (2.0, 1.7, 0.2, True)],
)  # fmt: skip
def test_a_loss_must_be_lower_by_more_than_the_margin(
    before: float, now: float, margin: float, promoted: bool
) -> None:
    assert decision(loss(now), loss(before), margin=margin) is promoted


def test_an_accuracy_must_be_higher() -> None:
    assert decision({"accuracy": 0.6}, {"accuracy": 0.5}, metric="accuracy")
    assert not decision({"accuracy": 0.4}, {"accuracy": 0.5}, metric="accuracy")


@pytest.mark.parametrize(("accuracy", "promoted"), [(0.5, True), (0.46, True), (0.44, False), (0.9, True)])
def test_a_guard_may_get_worse_by_its_share_and_no_more(accuracy: float, promoted: bool) -> None:
    champion = loss(2.0, accuracy=0.5)
    assert decision(loss(1.0, accuracy=accuracy), champion, guards={"accuracy": 0.1}) is promoted


@pytest.mark.parametrize(("perplexity", "promoted"), [(104.0, True), (106.0, False), (50.0, True)])
def test_general_text_guards_through_its_perplexity(perplexity: float, promoted: bool) -> None:
    champion = loss(2.0, guard_perplexity=100.0)
    challenger = loss(1.0, guard_perplexity=perplexity)
    assert decision(challenger, champion, guard_data="text.txt", guard_bound=0.05) is promoted


def test_a_challenger_without_a_finite_number_stays_out_and_such_a_champion_goes() -> None:
    assert not decision(loss(math.nan), loss(2.0))
    assert not decision(loss(math.inf), None)
    assert decision(loss(2.0), loss(math.nan))


@pytest.mark.parametrize(
    ("challenger", "champion", "settings", "words"),
    [
        (
            loss(1.0),
            loss(2.0),
            {"metric": "bleu"},
            ["promote.metric", "bleu", "challenger", "merged_eval_loss"],
        ),
        (loss(1.0), {"accuracy": 0.5}, {}, ["promote.metric", "merged_eval_loss", "champion", "accuracy"]),
        (loss(1.0), loss(2.0), {"guards": {"accuracy": 0.1}}, ["promote.guards", "accuracy"]),
        ({}, None, {}, ["promote.metric", "it has none"]),
    ],
)
def test_a_metric_that_a_model_does_not_have_is_named(
    challenger: dict, champion: dict | None, settings: dict, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        decision(challenger, champion, **settings)
    for word in words:
        assert word in str(caught.value)


def test_the_decision_carries_the_numbers_that_it_compared() -> None:
    found = decide(
        loss(1.0, accuracy=0.5, other=1.0), loss(2.0, accuracy=0.5), PromoteSettings(guards={"accuracy": 0.0})
    )
    assert found.challenger == loss(1.0, accuracy=0.5) and found.champion == loss(2.0, accuracy=0.5)
    assert "1" in found.reason and "2" in found.reason


def test_where_there_are_test_rows_their_loss_decides_unless_a_metric_is_named() -> None:
    better = {"merged_test_loss": 1.0, "merged_eval_loss": 3.0}
    worse = {"merged_test_loss": 2.0, "merged_eval_loss": 2.0}
    decision = decide(better, worse, PromoteSettings())
    assert decision.promote and decision.reason.startswith("merged_test_loss 1 against 2")
    assert not decide(better, worse, PromoteSettings(metric="merged_eval_loss")).promote
    assert not decide(loss(3.0), worse, PromoteSettings()).promote
