"""Promoting a version: the numbers of both models, the gate's decision, and its record on the version."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.scoring.held_out import read_eval_rows
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.steps.promote.gate import Decision, decide
from spectraqlora.tracking.registry import DECISION, EVAL_ROWS, Registry, Version

_OF_THE_ROWS = frozenset(
    {"merged_eval_loss", "eval_loss", "perplexity", "accuracy", "base_eval_loss", "base_accuracy"}
)
"""Metrics that say nothing about another model unless both were measured on the same rows."""


@dataclass(frozen=True)
class Outcome:
    """What came of a promotion: the decision, whom it was made against, and how the numbers were got."""

    version: int
    decision: str
    reason: str
    against: int | None
    scored: str
    challenger: dict[str, float]
    champion: dict[str, float]

    @property
    def promoted(self) -> bool:
        return self.decision in ("promoted", "forced", "rolled back")


class Promotion:
    """One challenger before the gate; scores are kept, so that deciding again costs nothing.

    Args:
        registry: of the model.
        challenger: the version that wants to be champion.
        settings: the `promote` section.
        evaluate: how rows are scored.
    """

    def __init__(
        self, registry: Registry, challenger: Version, settings: PromoteSettings, evaluate: EvaluateSettings
    ) -> None:
        self.registry, self.challenger = registry, challenger
        self.settings, self.evaluate = settings, evaluate
        self._again: dict[int, dict[str, float]] = {}
        self._guard: dict[int, float] = {}

    def run(self, dry_run: bool = False, force: str = "") -> Outcome:
        """Decide and, unless it is a dry run, act: alias, ledger, and the decision as tags of the version.

        Args:
            dry_run: only say what would be decided.
            force: a reason to promote whatever the gate says.

        Raises:
            InputError: a metric that one of the models does not have.
        """
        last: list[Outcome] = []

        def choose(champion: Version | None) -> tuple[int, str, str] | None:
            outcome = self._outcome(champion, force)
            last[:] = [outcome]
            if not outcome.promoted:
                return None
            return outcome.version, outcome.decision, outcome.reason

        if dry_run:
            choose(self.registry.by_alias("champion"))
            return last[0]
        self.registry.change_champion(choose)
        if last[0].decision != "is champion":
            self._record(last[0])
        return last[0]

    def _outcome(self, champion: Version | None, force: str) -> Outcome:
        number = self.challenger.number
        against = champion.number if champion else None
        if champion is not None and champion.number == number:
            return Outcome(number, "is champion", "it is the champion already", number, "not at all", {}, {})
        if force:
            return Outcome(number, "forced", force, against, "not at all", {}, {})
        found, how = self._decision(champion)
        return Outcome(
            number,
            "promoted" if found.promote else "not promoted",
            found.reason,
            against,
            how,
            dict(found.challenger),
            dict(found.champion),
        )

    def _decision(self, champion: Version | None) -> tuple[Decision, str]:
        ours = self.registry.run_metrics(self.challenger)
        if champion is None:
            return decide({**ours, **self._guards(self.challenger)}, None, self.settings), "when trained"
        theirs = self.registry.run_metrics(champion)
        same = self.challenger.tags.get("eval_digest", "") == champion.tags.get("eval_digest")
        if not same or self.settings.guard_data:
            mine, other = (v.tags.get("tokenizer_digest") for v in (self.challenger, champion))
            if mine != other:
                reason = "the champion has another tokenizer, so losses per token do not compare; use --force"
                return Decision(False, reason, {}, {}), "not at all"
        if not same:
            ours = {**_lasting(ours), **self._scored_again(self.challenger)}
            theirs = {**_lasting(theirs), **self._scored_again(champion)}
        ours.update(self._guards(self.challenger))
        theirs.update(self._guards(champion))
        how = "when trained, on the same rows" if same else "again, both on the challenger's rows"
        return decide(ours, theirs, self.settings), how

    def _scored_again(self, version: Version) -> dict[str, float]:
        if version.number not in self._again:
            self._score(version, rows=True)
        return self._again[version.number]

    def _guards(self, version: Version) -> dict[str, float]:
        if not self.settings.guard_data:
            return {}
        from spectraqlora.steps.promote.rescore import guard_digest

        digest = guard_digest(self.settings.guard_data, self.settings.guard_rows)
        if version.tags.get("guard_digest") == digest:
            return {"guard_perplexity": version.metrics["guard_perplexity"]}
        if version.number not in self._guard:
            self._score(version, rows=False)
        return {"guard_perplexity": self._guard[version.number]}

    def _score(self, version: Version, rows: bool) -> None:
        from spectraqlora.steps.promote.rescore import guard_perplexity, score_again
        from spectraqlora.tracking.registered_model import load_model

        print(f"scoring {version.name} version {version.number}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch)
            model, tokenizer = load_model(self.registry.download_model(version, target))
            if rows:
                kept = self.registry.download(self.challenger, EVAL_ROWS, target)
                scored, answers = read_eval_rows(kept)
                self._again[version.number] = score_again(model, tokenizer, scored, answers, self.evaluate)
            if self.settings.guard_data and version.number not in self._guard:
                self._guard[version.number] = guard_perplexity(
                    model,
                    tokenizer,
                    self.settings.guard_data,
                    self.settings.guard_rows,
                    self.evaluate.batch_size,
                )

    def _record(self, outcome: Outcome) -> None:
        """The decision and its numbers as tags of the challenger; perplexities measured now, of both."""
        from spectraqlora.steps.promote.rescore import guard_digest

        for number, value in self._guard.items():
            digest = guard_digest(self.settings.guard_data, self.settings.guard_rows)
            self.registry.tag(number, {"guard_perplexity": f"{value:.9g}", "guard_digest": digest})
        tags = {
            "decision": outcome.decision,
            "reason": outcome.reason,
            "against": str(outcome.against or "none"),
            "scored": outcome.scored,
            "metric": self.settings.metric,
            "margin": f"{self.settings.margin:g}",
            "eval_digest": self.challenger.tags.get("eval_digest", ""),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **{f"bound.{name}": f"{bound:g}" for name, bound in self.settings.bounds.items()},
            **{f"challenger.{name}": f"{value:.9g}" for name, value in outcome.challenger.items()},
            **{f"champion.{name}": f"{value:.9g}" for name, value in outcome.champion.items()},
        }
        self.registry.tag(outcome.version, {f"{DECISION}{key}": value for key, value in tags.items()})


def _lasting(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in _OF_THE_ROWS}


def rollback(registry: Registry, reason: str, dry_run: bool = False) -> Outcome:
    """Make the champion before the present one champion again.

    Raises:
        InputError: there is no champion, or none before it.
    """
    champion = registry.by_alias("champion")
    if champion is None:
        raise InputError("rollback", registry.name, "a champion; it has none")
    target = registry.previous()
    outcome = Outcome(target, "rolled back", reason, champion.number, "not at all", {}, {})
    if dry_run:
        return outcome

    def choose(present: Version | None) -> tuple[int, str, str] | None:
        # Somebody else was quicker: rolling back their change was not asked for.
        if present is None or present.number != champion.number:
            return None
        return target, "rolled back", reason

    entry, now = registry.change_champion(choose)
    if entry is None:
        raise InputError(
            "rollback",
            champion.number,
            f"the champion; version {now.number if now else None} is it meanwhile",
        )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    for version, text in ((champion.number, "rolled back from"), (target, "rolled back to")):
        registry.tag(version, {f"{DECISION}decision": text, f"{DECISION}reason": reason, f"{DECISION}at": at})
    return outcome
