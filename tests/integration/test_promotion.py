"""Promotion in a real registry: the gate, the ledger, the aliases, and the commands."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spectraqlora.errors import InputError
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.steps.promote.promotion import Outcome, Promotion, rollback
from spectraqlora.tracking.ledger import Ledger
from spectraqlora.tracking.registry import CHAMPION, COMPLETING_TAG, OWN_TAG, PREVIOUS, Registry
from spectraqlora_pipelines.cli import app
from typer.testing import CliRunner, Result

from tests.registered import register, registry

_names = (f"model-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("promotion")


@pytest.fixture
def models(workdir: Path) -> Registry:
    """A registered model of the test's own in a store that the tests share."""
    return registry(f"sqlite:///{workdir}/mlflow.db", next(_names))


def promote(models: Registry, version: int, **arguments: Any) -> Outcome:
    settings = PromoteSettings.model_validate(arguments.pop("settings", {}))
    return Promotion(models, models.version(version), settings, EvaluateSettings()).run(**arguments)


def aliases(models: Registry) -> dict[str, int]:
    return {alias: v.number for v in models.versions() for alias in v.aliases}


def test_a_better_version_becomes_champion_and_the_one_before_is_remembered(models: Registry) -> None:
    first, second, worse = (register(models, loss=loss) for loss in (2.0, 1.5, 1.7))
    assert promote(models, first).reason == "there was no champion"
    done = promote(models, second)
    assert done.promoted and done.against == first
    assert not promote(models, worse).promoted
    assert aliases(models) == {CHAMPION: second, PREVIOUS: first, "challenger": worse}
    assert [(r.version, r.before) for r in Ledger(models).entries()] == [(first, None), (second, first)]


def test_the_decision_and_its_numbers_are_tags_of_the_version(models: Registry) -> None:
    first, second = register(models, loss=2.0, accuracy=0.5), register(models, loss=1.0, accuracy=0.1)
    promote(models, first)
    settings = {"margin": 0.25, "guards": {"accuracy": 0.1}}
    assert not promote(models, second, settings=settings).promoted
    tags = models.version(second).tags
    assert (
        tags["promotion.decision"] == "not promoted"
        and "accuracy 0.1 against 0.5" in tags["promotion.reason"]
    )
    assert tags["promotion.against"] == str(first) and tags["promotion.margin"] == "0.25"
    assert (
        tags["promotion.challenger.merged_eval_loss"] == "1" and tags["promotion.champion.accuracy"] == "0.5"
    )
    assert tags["promotion.bound.accuracy"] == "0.1" and tags["promotion.eval_digest"] == "rows"
    assert "same rows" in tags["promotion.scored"]


def test_the_test_rows_decide_and_versions_of_others_are_scored_again(models: Registry) -> None:
    first = register(models, loss=1.0, merged_test_loss=2.0, test_digest="test")
    second = register(models, loss=3.0, merged_test_loss=1.5, test_digest="test")
    promote(models, first)
    assert "merged_test_loss 1.5 against 2" in promote(models, second).reason
    tags = models.version(second).tags
    assert tags["promotion.metric"] == "merged_test_loss" and tags["promotion.test_digest"] == "test"
    assert promote(models, second, settings={"metric": "merged_eval_loss"}).decision == "is champion"
    other = register(models, loss=3.0, merged_test_loss=1.0, test_digest="others")
    # Its run keeps neither rows nor model: what was logged on other rows is not compared instead.
    with pytest.raises(InputError, match="an MLflow model"):
        promote(models, other)


def test_a_dry_run_changes_nothing(models: Registry) -> None:
    first = register(models, loss=2.0)
    assert promote(models, first, dry_run=True).promoted
    assert CHAMPION not in aliases(models) and not Ledger(models).entries()
    assert not [tag for tag in models.version(first).tags if tag.startswith("promotion.")]


def test_force_needs_no_gate_and_records_its_reason(models: Registry) -> None:
    first, worse = register(models, loss=1.0), register(models, loss=2.0)
    promote(models, first)
    assert promote(models, worse, force="reviewed by hand").decision == "forced"
    assert aliases(models)[CHAMPION] == worse
    assert models.version(worse).tags["promotion.reason"] == "reviewed by hand"


def test_rollback_goes_back_one_promotion_at_a_time(models: Registry) -> None:
    versions = [register(models, loss=loss) for loss in (3.0, 2.0, 1.0)]
    for version in versions:
        promote(models, version)
    assert rollback(models, "slow").version == versions[1]
    assert aliases(models)[CHAMPION] == versions[1] and aliases(models)[PREVIOUS] == versions[0]
    assert models.version(versions[2]).tags["promotion.decision"] == "rolled back from"
    assert rollback(models, "slow too", dry_run=True).version == versions[0]
    assert rollback(models, "slow too").version == versions[0]
    assert aliases(models)[CHAMPION] == versions[0] and PREVIOUS not in aliases(models)
    with pytest.raises(InputError, match="none to go back to"):
        rollback(models, "again")
    assert promote(models, versions[2]).promoted and aliases(models)[PREVIOUS] == versions[0]


def test_a_promotion_that_died_before_it_set_the_alias_is_completed_by_the_next(models: Registry) -> None:
    first, second, third = (register(models, loss=loss) for loss in (3.0, 1.0, 2.0))
    promote(models, first)
    assert Ledger(models)._append(2, second, first, "promoted", "died here")
    assert aliases(models)[CHAMPION] == first
    done = promote(models, third)
    assert not done.promoted and done.against == second
    assert aliases(models)[CHAMPION] == second


def test_a_promotion_that_was_stopped_before_its_record_is_completed_by_its_retry(models: Registry) -> None:
    first, second = register(models, loss=3.0), register(models, loss=1.0)
    promote(models, first)
    assert Ledger(models)._append(2, second, first, "promoted", "stopped here")
    retry = promote(models, second)
    assert (retry.decision, retry.reason, retry.against) == ("promoted", "stopped here", first)
    assert retry.challenger["merged_eval_loss"] == 1.0 and retry.champion["merged_eval_loss"] == 3.0
    assert aliases(models)[CHAMPION] == second and aliases(models)[PREVIOUS] == first
    tags = models.version(second).tags
    assert tags["promotion.decision"] == "promoted" and tags["promotion.champion.merged_eval_loss"] == "3"
    assert promote(models, second).decision == "is champion"


def test_a_rollback_that_was_stopped_is_completed_and_not_done_twice(models: Registry) -> None:
    versions = [register(models, loss=loss) for loss in (3.0, 2.0, 1.0)]
    for version in versions:
        promote(models, version)
    assert Ledger(models)._append(4, versions[1], versions[2], "rolled back", "slow")
    assert rollback(models, "once more").reason == "slow"
    assert aliases(models)[CHAMPION] == versions[1]
    assert models.version(versions[2]).tags["promotion.decision"] == "rolled back from"
    assert rollback(models, "slow too").version == versions[0], "the next one is one of its own"


def test_a_version_that_its_register_step_did_not_complete_is_no_candidate(models: Registry) -> None:
    first, half = register(models, loss=3.0), register(models, loss=1.0)
    models.client.delete_model_version_tag(models.name, str(half), COMPLETING_TAG)
    assert [version.number for version in models.versions()] == [first]
    for which in (half, "challenger"):
        with pytest.raises(InputError, match="expected a complete version; the register step of run"):
            models.version(which)
    models.client.delete_model_version_tag(models.name, str(half), OWN_TAG)
    assert models.version(half).complete, "what others registered is taken as it is"


def test_an_alias_set_by_hand_is_taken_as_it_is(models: Registry) -> None:
    first, second = register(models, loss=1.0), register(models, loss=2.0)
    promote(models, first)
    models.set_alias(CHAMPION, second)
    better = register(models, loss=1.5)
    done = promote(models, better)
    assert done.promoted and done.against == second
    assert [r.kind for r in Ledger(models).entries()] == ["promoted", "set by hand", "promoted"]


def test_a_champion_that_changes_between_decision_and_deed_is_decided_against_again(models: Registry) -> None:
    first, best, middle = (register(models, loss=loss) for loss in (3.0, 1.0, 2.0))
    promote(models, first)
    seen: list[int | None] = []

    class Late(Promotion):
        def _outcome(self, champion: Any, force: str) -> Outcome:
            seen.append(champion.number)
            if len(seen) == 1:
                promote(models, best)
            return super()._outcome(champion, force)

    late = Late(models, models.version(middle), PromoteSettings(), EvaluateSettings()).run()
    assert seen == [first, best]
    assert not late.promoted and aliases(models)[CHAMPION] == best


def test_another_tokenizer_cannot_be_compared(models: Registry) -> None:
    first, second = (
        register(models, loss=2.0),
        register(models, loss=1.0, rows="others", tokenizer_digest="x"),
    )
    promote(models, first)
    done = promote(models, second)
    assert not done.promoted and "tokenizer" in done.reason


@pytest.fixture
def command(workdir: Path, models: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, uri: str = str(workdir)) -> Result:
        given = ["--uri", uri, "--name", models.name]
        given += ["--set", "tracking.experiment=registry tests"]
        return CliRunner().invoke(app.app, [*arguments, *given])

    return run


def test_the_commands_promote_force_roll_back_and_list(
    models: Registry, command: Callable[..., Result]
) -> None:
    register(models, loss=2.0)
    assert command("promote").exit_code == 0
    register(models, loss=2.5, accuracy=0.25)
    dry = command("promote", "--dry-run")
    assert dry.exit_code == 3 and "would be not promoted" in dry.output and "2.5" in dry.output
    assert command("promote").exit_code == 3
    assert command("promote", "--force", "by hand").exit_code == 0
    listed = command("models").output
    for words in ("champion", "challenger", "previous", "2.5", "0.25", "forced", "hybrid"):
        assert words in listed
    assert command("promote", "rollback", "--reason", "worse").exit_code == 0
    assert aliases(models)[CHAMPION] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "--version", "9"], ["'9'", "version or alias", "1 challenger"]),
        (["promote", "--set", "promote.metric=bleu"], ["promote.metric", "bleu", "merged_eval_loss"]),
        (["promote", "rollback"], ["rollback", "champion"]),
        (["models", "--set", "tracking.registered_model=a/b"], ["tracking.registered_model", "a/b"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    arguments: list[str], words: list[str], models: Registry, command: Callable[..., Result]
) -> None:
    register(models, loss=2.0)
    result = command(*arguments) if "a/b" not in str(arguments) else CliRunner().invoke(app.app, arguments)
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    for word in words:
        assert word in str(result.exception) and "\n" not in str(result.exception)
    assert CHAMPION not in aliases(models)


def test_a_place_without_a_registry_is_named(command: Callable[..., Result], tmp_path: Path) -> None:
    result = command("models", uri=str(tmp_path))
    assert isinstance(result.exception, InputError) and "--uri" in str(result.exception)
