"""The contracts between steps: every artifact is a folder with a manifest, read through one typed class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectraqlora.errors import InputError
from spectraqlora.files import write_text

SCHEMA_VERSION = 2
IGNORED = -100
"""Label of a token that does not count in the loss."""
GRADIENT_INIT = "a_init.safetensors"
"""Next to a rank map: the first A (rank x in) of a module, or of a group by its first module; of a group that shares B
the first B (out x rank), as `module.lora_B`."""

NOTHING = "none.txt"


def write_nothing(folder: str | Path, reason: str) -> None:
    """Make an artifact that holds nothing, and says why: object storage keeps no empty folders."""
    write_text(Path(folder) / NOTHING, f"{reason}\n")


class _Manifest(BaseModel):
    """A JSON document with a schema version, stored under a fixed name in the artifact's folder."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def filename(cls) -> str:
        return "manifest.json"

    def write(self, folder: str | Path) -> None:
        write_text(Path(folder) / self.filename(), self.model_dump_json(indent=1))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        path = Path(folder) / cls.filename()
        kind = cls.__name__
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(kind, path, "a readable JSON document; it is missing or cut short") from None
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            origin = "; it comes from version 0.1.0 and has to be made anew" if version == 1 else ""
            raise InputError(kind, path, f"schema version {SCHEMA_VERSION}{origin}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            if fault["type"] in ("missing", "extra_forbidden"):
                wanted = "this field" if fault["type"] == "missing" else "no such field"
                raise InputError(
                    f"{kind} {key}", path, f"{wanted}; it is another artifact's, or malformed"
                ) from None
            raise InputError(f"{kind} {key}", fault["input"], fault["msg"]) from None


class LinearModule(BaseModel):
    """One weight matrix of the decoder blocks as the loaded model names it."""

    model_config = ConfigDict(extra="forbid")
    module: str
    type: str
    layer: int
    out_features: int
    in_features: int
    four_bit: bool
    transposed: bool = Field(False, description="stored as in x out in the original checkpoint (Conv1D)")
    tensor: str = Field("", description="its tensor in the original checkpoint, where that is one of its own")


class ModelOutline(_Manifest):
    """What a step without a GPU needs of the 4-bit model: folder `model/` with its configs and tokenizer."""

    source: str
    revision: str
    source_path: str
    source_content: str = Field("", description="what the s3:// address held, by version or ETags")
    trust_remote_code: bool = Field(False, description="the model's own code may run, as the settings say")
    base_digest: str
    dtype: str = Field(
        "", description="of the original's weights, as torch calls it; empty where it is not known"
    )
    compute_dtype: str
    parameters: int
    modules: list[LinearModule]


class FourBitModel(ModelOutline):
    """The 4-bit model: folder `model/` as transformers saves it, tokenizer included."""

    quant_type: str = "nf4"
    double_quant: bool = True
    four_bit_parameters: int
    unquantized: list[str]


class DroppedRows(BaseModel):
    """Rows that are not used, all for one reason."""

    model_config = ConfigDict(extra="forbid")
    reason: str
    rows: int
    first: str = Field(description="file and row of the first of them, and what was wrong there")
    asked_for: bool = Field(False, description="a setting says so: rows beyond a limit, or equal ones")
    setting: str = Field("", description="the setting that would keep them")


class SourceAccount(BaseModel):
    """What became of the rows of one of several sources."""

    model_config = ConfigDict(extra="forbid")
    source: str
    weight: float | None = None
    read: int = Field(description="rows read")
    train: int = Field(description="of these, rows that are trained on")
    held_out: int
    test: int
    dropped: dict[str, int] = Field(description="rows that are not used, by reason")


class DataAccount(BaseModel):
    """What became of everything that was read."""

    model_config = ConfigDict(extra="forbid")
    files: dict[str, int] = Field(description="how many files each split was read from; ours are train alone")
    unused_files: list[str] = Field(description="data files that were not read")
    read: int = Field(description="rows read")
    used: int = Field(description="of these rows, how many are trained on, held out or kept for a test")
    dropped: list[DroppedRows]
    sources: list[SourceAccount] = Field(
        default_factory=list, description="the same by source, where there are several"
    )
    pieces: int = Field(0, description="sequences more than rows, since long rows were split")
    cut: int = Field(0, description="rows that were cut to data.max_length")
    equal: int = Field(0, description="rows that equal an earlier one, and are kept on its side")
    sides_equal: bool = Field(
        False, description="all rows are equal, so that held-out ones are trained on, too"
    )
    unused_columns: list[str]
    turns_without_labels: dict[str, int] = Field(
        description="the assistant's turns that are not learned, by reason"
    )
    left_out: dict[str, int] = Field(description="what the template does not write of the assistant's turns")
    tokens_read: int = Field(description="tokens of all rendered rows, dropped ones too")
    tokens_learned: int = Field(description="tokens of the training rows that count in the loss")
    max_length: int
    lengths: list[int] = Field(description="tokens of a row: median, 90 %, 99 %, longest")


Example = list[tuple[str, bool]]
"""A rendered row as pieces of text, each with whether it is learned."""


class PreparedRows(_Manifest):
    """Tokenized rows: Arrow folders `train/`, `held_out/` and, where there is one, `test/`, with input_ids and labels."""

    source: str
    digest: str
    layout: str
    train_rows: int
    eval_rows: int
    test_rows: int = Field(0, description="kept apart: neither trained on nor chosen by")
    train_tokens: int
    account: DataAccount
    examples: list[Example] = Field(description="the first training rows, with their learned part marked")
    answers: list[dict[str, str]] = Field(description="held-out rows with short answers: prompt, answer")
    turn_ends: list[int] = Field(
        default_factory=list, description="tokens that end an answer, the chat template's own first"
    )
    chat_template: str = Field(
        "", description="the one that was given; empty where the model's own, or none, is"
    )
    shared_sequences: bool = Field(False, description="rows of a batch share sequences (data.packing)")


class BaseMeasurement(_Manifest):
    """The 4-bit base before any training; next to it `sketches.safetensors` where gradients were measured."""

    base_digest: str
    rows_digest: str
    loss: float = Field(description="mean loss per counted token of the held-out rows, nats")
    perplexity: float
    accuracy: float | None = Field(description="share of exact answers; none where no answer can be scored")
    row_losses: list[float] = Field(description="summed loss of every held-out row, nats")
    row_tokens: list[int] = Field(description="counted tokens of every held-out row")
    sketched: bool = Field(description="whether the gradients of the base were measured")
    test_loss: float | None = Field(None, description="mean loss of the test rows, where there are any")

    @classmethod
    def filename(cls) -> str:
        return "measurement.json"

    def headline(self) -> dict[str, float]:
        """The numbers that KFP shows of a measurement."""
        values = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "test_loss": self.test_loss,
        }
        return {name: value for name, value in values.items() if value is not None}

    def check_origin(self, base_digest: str, rows_digest: str = "") -> None:
        """Refuse a measurement of another base model or, where their digest is given, of other rows (InputError)."""
        for name, own, wanted in (
            ("base_digest", self.base_digest, base_digest),
            ("rows_digest", self.rows_digest, rows_digest or self.rows_digest),
        ):
            if own != wanted:
                raise InputError(f"measurement {name}", own[:12], f"{wanted[:12]}, which this run has")


Shared = Literal["pair", "A", "B"]
"""What the modules of a group share: their whole adapter, its A or its B."""


class ModuleRank(BaseModel):
    """What one module gets: no adapter at rank 0; modules of the same group share what `shared` says."""

    model_config = ConfigDict(extra="forbid")
    module: str
    type: str
    layer: int
    tier: str
    rank: int = Field(ge=0)
    alpha: float = Field(ge=0)
    lr_scale: float = Field(1.0, gt=0)
    group: int | None = None
    shared: Shared = Field("pair", description="what its group shares; the other factor is its own")
    score: float | None = Field(None, description="what ranked it; none where it has no finite score")


class SideOverlap(BaseModel):
    """How much the leading gradient subspaces of modules overlap on one side, 0 to 1."""

    model_config = ConfigDict(extra="forbid")
    side: Literal["input", "output"] = Field(
        description="of the matrices: what faces the residual stream there"
    )
    modules: list[str]
    overlaps: list[list[float]] = Field(description="of every pair, in the order of `modules`")
    chance: float = Field(description="the largest overlap of random subspaces of this size that was drawn")


class Similarity(_Manifest):
    """What groups of modules were made from: cosines of whole gradients, or the overlap of their subspaces per side."""

    modules: list[str] = Field(description="all candidates")
    cosines: list[list[float | None]] = Field(
        default_factory=list,
        description="of gradients of equal type and shape; empty where sides were compared",
    )
    groups: list[list[str]]
    sides: list[SideOverlap] = Field(
        default_factory=list, description="empty where whole gradients were compared"
    )
    threshold: float | None = Field(None, description="lowest similarity inside a group")

    @classmethod
    def filename(cls) -> str:
        return "similarity.json"


class RankMap(_Manifest):
    """Rank, alpha and learning-rate scale of every module, and what made them.

    Where groups of modules were made by similarity, that is stored in a file of its own next to the map.
    """

    method: str
    round: int
    base_digest: str = Field(description="empty until the step that knows the base model fills it in")
    settings: dict[str, Any]
    modules: list[ModuleRank]
    changes: list[str] = Field(default_factory=list, description="what re-evaluation moved, in words")
    budget: int = Field(0, ge=0, description="parameters that no round of the branch trains more than")
    similarity: Similarity | None = Field(None, exclude=True, description="what the groups were made from")

    @classmethod
    def filename(cls) -> str:
        return "rank_map.json"

    def write(self, folder: str | Path) -> None:
        if self.similarity is not None:
            self.similarity.write(folder)
        super().write(folder)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        rank_map = super().read(folder)
        if (Path(folder) / Similarity.filename()).exists():
            rank_map.similarity = Similarity.read(folder)
        return rank_map

    def scaling(self, entry: ModuleRank) -> float:
        """Factor before B·A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
        stabilised = self.settings.get("variant") == "rslora"
        return entry.alpha / (entry.rank**0.5 if stabilised else entry.rank)

    def active(self) -> list[ModuleRank]:
        """The modules with an adapter, in the order of the model; those of tier `frozen` are among them."""
        return [m for m in self.modules if m.rank > 0]

    def trained(self) -> list[ModuleRank]:
        """The modules whose adapter is trained, in the order of the model."""
        return [m for m in self.active() if m.tier != "frozen"]

    def check_base(self, base_digest: str) -> None:
        """Refuse a rank map that was made from another base model (InputError)."""
        if self.base_digest != base_digest:
            raise InputError(
                "rank map base_digest",
                self.base_digest[:12],
                f"{base_digest[:12]}, the base model of this run; it was made from another one",
            )


class TrainingCheckpoint(_Manifest):
    """A training between two steps: written last, with the SHA-256 of the files next to it."""

    identity: str = Field(description="digest of everything that the training depends on")
    step: int = Field(ge=1, description="optimizer steps of this round that are done")
    files: dict[str, str] = Field(description="SHA-256 by name")


class TrainingLog(_Manifest):
    """What training did, and with what: settings, curves, cost and the count of trained parameters."""

    method: str
    round: int
    settings: dict[str, Any] = Field(description="the section train")
    trainable_parameters: int
    train_seconds: float
    train_tokens: int
    train_tokens_per_second: float
    peak_memory_bytes: int = Field(description="of one process, the highest")
    processes: int = 1
    seed: int | None = Field(None, description="of reading order, dropout and fresh adapters")
    image: str = Field("", description="in which it ran")
    best_eval_loss: float
    loss_curve: list[tuple[int, float]]
    eval_curve: list[tuple[int, float]]

    @classmethod
    def filename(cls) -> str:
        return "training.json"


class RoundResult(BaseModel):
    """One round of a branch."""

    model_config = ConfigDict(extra="forbid")
    round: int
    eval_loss: float
    changes: list[str] = Field(description="what moves in the round that follows; empty where none does")
    training: TrainingLog
    rank_map: RankMap
    update_spectrum: dict[str, dict[str, float]]


class Evaluation(_Manifest):
    """A branch's result on the held-out rows, with everything the report shows of it."""

    method: str
    base_digest: str
    data_digest: str
    base_eval_loss: float
    base_perplexity: float
    base_accuracy: float | None
    eval_loss: float
    eval_loss_stderr: float
    perplexity: float
    accuracy: float | None
    eval_rows: int
    row_losses: list[float] = Field(description="summed loss of every held-out row, nats")
    row_tokens: list[int] = Field(description="counted tokens of every held-out row")
    settings: dict[str, dict[str, Any]] = Field(description="the sections select, evaluate and snr")
    trainable_parameters: int
    train_seconds: float
    train_tokens_per_second: float
    peak_memory_bytes: int
    rounds: list[RoundResult]
    snr_after: dict[str, float | None]
    similarity: Similarity | None = None
    base_test_loss: float | None = Field(
        None, description="the base's mean loss of the test rows, where there are any"
    )

    @classmethod
    def filename(cls) -> str:
        return "evaluation.json"

    def headline(self) -> dict[str, float]:
        """The numbers of an evaluation that a table of runs shows."""
        values = {
            "eval_loss": self.eval_loss,
            "base_eval_loss": self.base_eval_loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "base_accuracy": self.base_accuracy,
            "base_test_loss": self.base_test_loss,
            "trainable_parameters": float(self.trainable_parameters),
            "train_seconds": self.train_seconds,
            "train_tokens_per_second": self.train_tokens_per_second,
            "peak_memory_bytes": float(self.peak_memory_bytes),
        }
        return {name: value for name, value in values.items() if value is not None}


class MergedModel(_Manifest):
    """The exported winner: `merged/` and `adapter/` next to this manifest, which is written last."""

    method: str
    base_digest: str
    merged_into: str
    adapter_eval_loss: float
    eval_loss_quantized: float
    eval_loss_original: float
    verified_eval_loss: float
    test_rows: int = Field(0, description="rows that chose nothing, scored once, with what is exported")
    test_loss: float | None = Field(None, description="mean loss of the test rows; none where there are none")
    test_loss_stderr: float | None = None
    base_test_loss: float | None = Field(None, description="the 4-bit base's, on the same rows")
    dtype: str = Field("", description="of the exported weights, as torch calls it")
    warning: str = Field("", description="what a person should know before using it; empty where nothing")
    trust_remote_code: bool = Field(False, description="loading it runs the model's own code")
    signed_by: str = Field("", description="SHA-256 of the key that signed it; empty where nobody did")
    published: dict[str, str] = Field(
        default_factory=dict, description="s3:// addresses of the plain files, by folder"
    )
