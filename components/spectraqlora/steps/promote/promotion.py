"""Promoting a version: the gate's decision, its place in the ledger, and its record on the version."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from spectraqlora.errors import InputError
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.steps.promote.gate import Decision, decide, with_metric
from spectraqlora.steps.promote.scores import Scores
from spectraqlora.tracking.ledger import Kind, Ledger, LedgerEntry
from spectraqlora.tracking.registry import (
    CHAMPION,
    COMPLETING_TAG,
    DECISION,
    TEST_LOSS,
    Registry,
    Version,
)
from spectraqlora.tracking.signed_model import check_signature

_OF_THE_ROWS = frozenset(
    {COMPLETING_TAG, "eval_loss", "perplexity", "accuracy", "base_eval_loss", "base_accuracy"}
    | {TEST_LOSS, "base_test_loss"}
)
"""Metrics that say nothing about another model unless both were measured on the same rows."""


@dataclass(frozen=True)
class Outcome:
    """What came of a promotion: the decision, whom it was made against, and where the numbers are from."""

    version: int
    decision: str
    reason: str
    against: int | None
    scored: str
    challenger: dict[str, float]
    champion: dict[str, float]

    @property
    def promoted(self) -> bool:
        """Whether the version became champion."""
        return self.decision in ("promoted", "forced", "rolled back")


class Promotion:
    """One challenger before the gate; scores are kept, so that deciding again costs nothing.

    Args:
        registry: of the model.
        challenger: the version that wants to be champion.
        settings: the `promote` section.
        evaluate: how rows are scored.
        signature_required: whether an unsigned challenger is refused.
    """

    def __init__(
        self,
        registry: Registry,
        challenger: Version,
        settings: PromoteSettings,
        evaluate: EvaluateSettings,
        signature_required: bool = False,
    ) -> None:
        self._signature_required = signature_required
        self.registry, self.challenger, self.settings = registry, challenger, settings
        self._scores = Scores(registry, challenger, settings, evaluate)

    def run(self, dry_run: bool = False, force: str = "") -> Outcome:
        """Decide and, unless it is a dry run, act: alias, ledger, and the decision as tags of the version.

        A promotion that was stopped after it took its place in the ledger is completed, not decided again.

        Args:
            dry_run: only say what would be decided.
            force: a reason to promote whatever the gate says.

        Raises:
            InputError: a metric that one of the models does not have; or the challenger is not what was signed.
        """
        check_signature(self.registry, self.challenger, self._signature_required)
        if dry_run:
            return self._outcome(self.registry.by_alias(CHAMPION), force)
        ledger = Ledger(self.registry)
        ledger.settle()
        for stopped in ledger.unrecorded():
            if stopped.version == self.challenger.number and stopped.kind != "rolled back":
                return self._record(self._outcome_of(stopped), ledger, stopped)
        outcome: Outcome

        def choose(champion: Version | None) -> tuple[int, Kind, str] | None:
            nonlocal outcome
            outcome = self._outcome(champion, force)
            kind: Kind = "forced" if force else "promoted"
            return (outcome.version, kind, outcome.reason) if outcome.promoted else None

        entry, _ = ledger.change_champion(choose)
        return outcome if outcome.decision == "is champion" else self._record(outcome, ledger, entry)

    def _outcome(self, champion: Version | None, force: str) -> Outcome:
        number = self.challenger.number
        against = champion.number if champion else None
        if champion is not None and champion.number == number:
            return Outcome(number, "is champion", "it is the champion already", number, "not at all", {}, {})
        if force:
            return Outcome(number, "forced", force, against, "not at all", {}, {})
        decision, scored = self._decision(champion)
        return Outcome(
            number,
            "promoted" if decision.promote else "not promoted",
            decision.reason,
            against,
            scored,
            dict(decision.challenger),
            dict(decision.champion),
        )

    def _outcome_of(self, entry: LedgerEntry) -> Outcome:
        """What was decided for an entry of the ledger, with the numbers that were compared for it."""
        number, before = self.challenger.number, entry.before
        if entry.kind == "forced":
            return Outcome(number, entry.kind, entry.reason, before, "not at all", {}, {})
        replaced = next((v for v in self.registry.versions() if v.number == before), None)
        decision, scored = self._decision(replaced)
        return Outcome(
            number,
            entry.kind,
            entry.reason,
            before,
            scored,
            dict(decision.challenger),
            dict(decision.champion),
        )

    def _decision(self, champion: Version | None) -> tuple[Decision, str]:
        """The gate's decision, and where its numbers come from."""
        ours = self.registry.run_metrics(self.challenger)
        self.settings = with_metric(self.settings, ours)
        if champion is None:
            return decide(
                {**ours, **self._scores.guard(self.challenger)}, None, self.settings
            ), "when trained"
        theirs = self.registry.run_metrics(champion)
        same = _scored_on(self.challenger) == _scored_on(champion)
        if self.settings.metric == TEST_LOSS:
            same &= TEST_LOSS in theirs
        if not same or self.settings.guard_data:
            mine, other = (v.tags.get("tokenizer_digest") for v in (self.challenger, champion))
            if mine != other:
                reason = "the champion has another tokenizer, so losses per token do not compare; use --force"
                return Decision(False, reason, {}, {}), "not at all"
        if not same:
            ours = {**_independent(ours), **self._scores.on_rows(self.challenger)}
            theirs = {**_independent(theirs), **self._scores.on_rows(champion)}
        ours.update(self._scores.guard(self.challenger))
        theirs.update(self._scores.guard(champion))
        how = "when trained, on the same rows" if same else "again, both on the challenger's rows"
        return decide(ours, theirs, self.settings), how

    def _record(self, outcome: Outcome, ledger: Ledger, entry: LedgerEntry | None) -> Outcome:
        """The decision and its numbers as tags of the challenger; perplexities measured now, of both."""
        for number, tags in self._scores.guard_tags().items():
            self.registry.tag(number, tags)
        tags = {
            "decision": outcome.decision,
            "reason": outcome.reason,
            "against": str(outcome.against or "none"),
            "scored": outcome.scored,
            "metric": self.settings.metric,
            "margin": f"{self.settings.margin:g}",
            "eval_digest": self.challenger.tags.get("eval_digest", ""),
            "test_digest": self.challenger.tags.get("test_digest", ""),
            "at": _now(),
            **{f"bound.{name}": f"{bound:g}" for name, bound in self.settings.bounds.items()},
            **{f"challenger.{name}": f"{value:.9g}" for name, value in outcome.challenger.items()},
            **{f"champion.{name}": f"{value:.9g}" for name, value in outcome.champion.items()},
        }
        self.registry.tag(outcome.version, {f"{DECISION}{key}": value for key, value in tags.items()})
        if entry is not None:
            ledger.mark_recorded(entry)
        return outcome


def _independent(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that do not depend on which rows were scored."""
    return {name: value for name, value in metrics.items() if name not in _OF_THE_ROWS}


def _scored_on(version: Version) -> tuple[str, str]:
    """Digests of a version's held-out and test rows; where it has none, like those of no other."""
    return version.tags.get("eval_digest", f"version {version.number}"), version.tags.get("test_digest", "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def rollback(
    registry: Registry, reason: str, dry_run: bool = False, signature_required: bool = False
) -> Outcome:
    """Make the champion before the present one champion again; a rollback that was stopped is completed instead.

    Args:
        registry: of the model.
        reason: why; it is recorded.
        dry_run: only say what would be done.
        signature_required: whether an unsigned version is refused.

    Raises:
        InputError: there is no champion, or none before it; or another one came in between; or the version before it is not
            what was signed.
    """
    ledger = Ledger(registry)
    champion = registry.by_alias(CHAMPION) if dry_run else ledger.settle()
    if champion is None:
        raise InputError("rollback", registry.name, "a champion; it has none")
    if not dry_run:
        stopped = [entry for entry in ledger.unrecorded() if entry.kind == "rolled back"]
        for entry in stopped:
            _record_rollback(ledger, entry, entry.reason)
        if stopped and stopped[-1] == ledger.entries()[-1]:
            last = stopped[-1]
            return Outcome(last.version, last.kind, last.reason, last.before, "not at all", {}, {})
    target = ledger.previous()
    check_signature(registry, registry.version(target), signature_required)
    outcome = Outcome(target, "rolled back", reason, champion.number, "not at all", {}, {})
    if dry_run:
        return outcome

    def choose(present: Version | None) -> tuple[int, Kind, str] | None:
        # Somebody else was quicker: rolling back their change was not asked for.
        if present is None or present.number != champion.number:
            return None
        return target, "rolled back", reason

    done, now = ledger.change_champion(choose)
    if done is None:
        raise InputError(
            "rollback",
            champion.number,
            f"the champion; version {now.number if now else None} is it meanwhile",
        )
    _record_rollback(ledger, done, reason)
    return outcome


def _record_rollback(ledger: Ledger, entry: LedgerEntry, reason: str) -> None:
    """Tags of both versions say which way the champion went."""
    for version, decision in ((entry.before, "rolled back from"), (entry.version, "rolled back to")):
        if version is not None:
            tags = {"decision": decision, "reason": reason, "at": _now()}
            ledger.registry.tag(version, {f"{DECISION}{key}": value for key, value in tags.items()})
    ledger.mark_recorded(entry)
