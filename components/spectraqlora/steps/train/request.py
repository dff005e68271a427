"""What one round of training is asked to do, as one value; training processes hand it to each other as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from spectraqlora.files import write_text
from spectraqlora.settings import CheckpointSettings, EvaluateSettings, TrackingSettings, TrainSettings


@dataclass(frozen=True)
class Inputs:
    """Folders that a training reads.

    Args:
        four_bit: the 4-bit model.
        rows: prepared rows.
        rank_map: the rank map, with the gradients' first A next to it where there is one.
        start: adapter of the same rank map to start from; without one B starts at zero.
    """

    four_bit: Path
    rows: Path
    rank_map: Path
    start: Path | None = None


@dataclass(frozen=True)
class TrainRequest:
    """One round of training.

    Args:
        inputs: folders to read.
        output: folder of the adapter artifact.
        seed: of reading order, dropout and fresh adapters.
        rounds: how many rounds the branch has in all.
        train: the `train` section.
        evaluate: the `evaluate` section; its batch size is that of the evaluations during training.
        checkpoint: the `checkpoint` section; none are written where it names no place.
        tracking: the `tracking` section.
        run_key: identifies the pipeline run in MLflow.
    """

    inputs: Inputs
    output: Path
    seed: int
    rounds: int = 1
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    run_key: str = ""

    def write(self, path: Path) -> None:
        """Write the request as a JSON file."""
        write_text(path, self.text())

    def text(self) -> str:
        """The request as JSON."""
        return _JSON.dump_json(self).decode()

    @classmethod
    def read(cls, path: Path) -> TrainRequest:
        """The request that `write` wrote."""
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, text: str | bytes) -> TrainRequest:
        """The request that `text` gave."""
        return _JSON.validate_json(text)


_JSON = TypeAdapter(TrainRequest)
