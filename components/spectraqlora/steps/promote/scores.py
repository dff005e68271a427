"""Scores of registered versions that are measured now: on the challenger's rows, and on general text."""

from __future__ import annotations

import tempfile
from pathlib import Path

from spectraqlora.runtime.console import say
from spectraqlora.scoring.held_out import read_held_out, read_test_rows
from spectraqlora.settings import EvaluateSettings, PromoteSettings
from spectraqlora.tracking.registry import HELD_OUT, Registry, Version


class Scores:
    """Scores a version once for all that is asked of it, and remembers them.

    Args:
        registry: of the model.
        challenger: the version whose rows all are scored on.
        settings: the `promote` section, with the general text.
        evaluate: how rows are scored.
    """

    def __init__(
        self, registry: Registry, challenger: Version, settings: PromoteSettings, evaluate: EvaluateSettings
    ) -> None:
        self._registry, self._challenger = registry, challenger
        self._settings, self._evaluate = settings, evaluate
        self._on_rows: dict[int, dict[str, float]] = {}
        self._guard: dict[int, float] = {}

    def on_rows(self, version: Version) -> dict[str, float]:
        """Losses, perplexity and, where there are answers, accuracy on the challenger's held-out and test rows."""
        if version.number not in self._on_rows:
            self._measure(version, rows=True)
        return self._on_rows[version.number]

    def guard(self, version: Version) -> dict[str, float]:
        """Perplexity on the general text, as the version's tags have it or measured now; empty without text."""
        if not self._settings.guard_data:
            return {}
        if version.tags.get("guard_digest") == self._digest():
            return {"guard_perplexity": version.metrics["guard_perplexity"]}
        if version.number not in self._guard:
            self._measure(version, rows=False)
        return {"guard_perplexity": self._guard[version.number]}

    def guard_tags(self) -> dict[int, dict[str, str]]:
        """Tags, by version, that spare the next promotion what was measured now on general text."""
        return {
            number: {"guard_perplexity": f"{value:.9g}", "guard_digest": self._digest()}
            for number, value in self._guard.items()
        }

    def _digest(self) -> str:
        from spectraqlora.steps.promote.rescore import guard_digest

        return guard_digest(self._settings.guard_data, self._settings.guard_rows)

    def _measure(self, version: Version, rows: bool) -> None:
        from spectraqlora.steps.promote.rescore import guard_perplexity, rescore
        from spectraqlora.tracking.registered_model import download_model, load_model

        say(f"scoring {version.name} version {version.number}")
        settings = self._settings
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch)
            model, tokenizer = load_model(download_model(self._registry.settings, version, target))
            if rows:
                kept = self._registry.download(self._challenger, HELD_OUT, target)
                scored, answers = read_held_out(kept)
                self._on_rows[version.number] = rescore(
                    model, tokenizer, scored, answers, self._evaluate, read_test_rows(kept)
                )
            if settings.guard_data and version.number not in self._guard:
                self._guard[version.number] = guard_perplexity(
                    model, tokenizer, settings.guard_data, settings.guard_rows, self._evaluate.batch_size
                )
