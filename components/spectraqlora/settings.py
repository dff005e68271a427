"""Every setting, once: type, range, default and explanation.

The command line, the config file, the pipeline's parameters and the README's reference come from here.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from spectraqlora.documents import read_yaml
from spectraqlora.errors import InputError, holds_secret


def _method_name(value: str) -> str:
    if not re.fullmatch("[a-z][a-z0-9_]{0,39}", value):
        raise ValueError("a method's name: a letter, then letters, digits or _, all in lower case")
    return value


MethodName = Annotated[str, AfterValidator(_method_name)]
"""Which names there are is known to methods/catalogue.py, which is above this module."""


def _without_secret(value: str) -> str:
    if "://" in value and holds_secret(value):
        raise ValueError("a name, a path or an address without user, password or token")
    return value


Where = Annotated[str, AfterValidator(_without_secret)]
"""Where something is read: it gets into compiled pipelines, manifests and MLflow, and so is no place for a secret."""


def _switch(value: object) -> object:
    """YAML reads on and off as booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Packing = Annotated[Literal["off", "rows"], BeforeValidator(_switch)]


RENAMED = {"evaluate.energy": "evaluate.update_energy"}
"""Settings of earlier versions, and what they are called now."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        section = cls.__name__.removesuffix("Settings").lower()
        for key in values if isinstance(values, dict) else ():
            old = f"{section}.{key}" if section else key
            if old in RENAMED:
                raise InputError(old, values[key], f"its new name, {RENAMED[old]}")
        return values


class ModelSettings(_Section):
    base_model: Where = Field(
        "sample", description="Hub id, folder, s3:// address, or `sample` for the built-in model"
    )
    revision: str = Field("main", description="Hub revision of the base model")
    trust_remote_code: bool = Field(
        False, description="Run code shipped with the model; off unless you trust it"
    )
    compute_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Compute type; auto is bfloat16 on GPUs that have it, float16 on others, float32 on CPUs",
    )


class DataPart(_Section):
    """One of several data sources."""

    source: Where = Field(description="As data.source", min_length=1)
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the training split's rows that are used, in proportion to the other weights; none uses all rows",
    )
    split: str = Field("train", description="As data.split, of this source")


class DataSettings(_Section):
    source: Where = Field(
        "sample",
        description="Hub id, folder, s3:// address, `sample`, or a file: .jsonl, .ndjson, .json, .csv, .tsv, .txt, .md "
        "(each also as .gz, .zst, .xz), .parquet, .arrow",
    )
    sources: tuple[DataPart, ...] = Field(
        (),
        description="In place of data.source several, each with source and, where wanted, weight and split: "
        "[{source: a.jsonl, weight: 3}, {source: owner/name, weight: 1}]",
    )
    subset: str = Field("", description="Which of the subsets that a folder's README lists (hub: its config)")
    split: str = Field(
        "train", description="Split to train on, of a folder or hub data set; several with + between them"
    )
    columns: dict[str, str] = Field(
        {},
        description="Which column is what, where no known layout fits: messages, or prompt and completion, or text; "
        "with input, system, history, tools",
    )
    preference: Literal["refuse", "chosen"] = Field(
        "refuse",
        description="Rows of chosen and rejected answers, or marked as good and bad by `label`: refuse them, or learn "
        "what was chosen, or is good",
    )
    encoding: str = Field(
        "utf-8", description="Encoding of text files without a byte order mark, such as cp1252"
    )
    deduplicate: Literal["off", "exact", "near"] = Field(
        "off",
        description="Rows that are equal but for white space and case: keep them, on one side (off), or one of each (exact); "
        "near keeps one of those that are nearly equal, too (MinHash, 0.8 of their runs of five characters)",
    )
    eval_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the rows held out for evaluation, where no split of the source is",
    )
    test_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the rows kept for the test that chooses nothing, where no split of the source is; 0 is none",
    )
    max_rows: int = Field(0, ge=0, description="Use at most this many rows; 0 is all")
    max_eval_rows: int = Field(200, ge=1, description="Hold out at most this many rows")
    max_test_rows: int = Field(1000, ge=1, description="Keep at most this many rows for the test")
    max_length: int = Field(
        512,
        ge=8,
        description="Longest row in tokens, the model's context at most; `data.too_long` says what becomes of others",
    )
    too_long: Literal["auto", "drop", "cut_left", "cut_right", "split"] = Field(
        "auto",
        description="Rows longer than data.max_length: drop them, keep their end (cut_left) or their beginning "
        "(cut_right), or split them into pieces; auto splits plain text and drops the rest",
    )
    split_by: Literal["shuffle", "content"] = Field(
        "shuffle",
        description="Choose the held-out rows by shuffling, or by each row's content, so that rows stay on their "
        "side when data grows; retraining always takes content",
    )
    pack: bool = Field(False, description="Pack plain-text rows into full sequences instead of padding")
    packing: Packing = Field(
        "off",
        description="Let the rows of a batch share sequences (rows), none of them seen by another: the same losses "
        "without padding",
    )
    prompt_template: str = Field(
        "Question: {prompt}\nAnswer:", description="Wraps a prompt where the tokenizer has no chat template"
    )

    chat_template: str = Field(
        "",
        description="Chat template in place of the model's own: a file, or chatml, gemma, llama-2, llama-3, mistral, "
        "phi-3, vicuna or zephyr; the export has it, too",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="What is learned of a conversation: every assistant's turn, the last one, or all of its text",
    )

    @property
    def parts(self) -> tuple[DataPart, ...]:
        """The data sources: those of `sources`, else the one that `source` names."""
        return self.sources or (DataPart(source=self.source, split=self.split),)

    def at(self, names: Sequence[str]) -> Self:
        """The same settings with the sources called otherwise, one name a source."""
        if not self.sources:
            return self.model_copy(update={"source": names[0]})
        pairs = zip(self.sources, names, strict=True)
        parts = tuple(part.model_copy(update={"source": name}) for part, name in pairs)
        return self.model_copy(update={"sources": parts})

    @property
    def named(self) -> str:
        """The names of all sources."""
        return ", ".join(part.source for part in self.parts)

    @field_validator("sources")
    @classmethod
    def _all_weighed_or_none(cls, value: tuple[DataPart, ...]) -> tuple[DataPart, ...]:
        if len({part.weight is None for part in value}) > 1:
            raise ValueError("a weight for every source, or for none")
        return value

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.sources and self.source != "sample":
            raise InputError(
                "data.sources", self.named, f"data.source ({self.source}) or data.sources, not both"
            )
        return self

    @field_validator("prompt_template")
    @classmethod
    def _has_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("a text that contains {prompt}")
        return value

    @field_validator("columns")
    @classmethod
    def _known_parts(cls, value: dict[str, str]) -> dict[str, str]:
        known = ("messages", "prompt", "completion", "text", "input", "system", "history", "tools")
        kinds = [("messages",), ("prompt", "completion"), ("text",)]
        given = [parts for parts in kinds if all(value.get(part) for part in parts)]
        if value and (set(value) - set(known) or len(given) != 1 or not all(value.values())):
            raise ValueError(
                "messages, or prompt and completion, or text, each with its column's name; and of "
                "input, system, history, tools what there is"
            )
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            if codecs.lookup(value)._is_text_encoding:
                return value
        except LookupError:
            pass
        raise ValueError("an encoding of text, such as utf-8 or cp1252")


def data_section(values: Mapping[str, Any], source: str) -> DataSettings:
    """The `data` section of a pipeline's parameters; `source` is the one source, where it does not have several."""
    section = DataSettings(**values)
    return section if section.sources else section.model_copy(update={"source": source})


class SnrSettings(_Section):
    source: Literal["original", "quantized"] = Field(
        "original",
        description="Measure the original weights, or the 4-bit weights dequantized; chosen where the pipeline is "
        "compiled",
    )
    ties: Literal["spectrum", "calibrated"] = Field(
        "spectrum",
        description="How matrices without noise, whose SNR is infinite, are ordered: as Spectrum's program does, "
        "which takes their noise for 1, or before all others by the calibrated value",
    )
    table: Where = Field(
        "",
        description="Take this table instead of measuring: Spectrum's JSON, or Parquet as `snr` writes it; "
        "a path or an s3:// address",
    )


class SelectSettings(_Section):
    percent: float = Field(
        50.0, gt=0, le=100, description="Share of the matrices (scope all: of their adapters' cost) selected"
    )
    signal: Literal["spectrum", "energy", "gradient_snr", "combined"] = Field(
        "energy",
        description="What ranks modules: weight SNR alone (`spectrum`, as published), the task's low-rank gradient "
        "energy per adapter parameter, the gradient's signal-to-noise ratio over batches, or weight SNR and energy "
        "combined",
    )
    scope: Literal["type", "all"] = Field(
        "type", description="Rank modules within their module type, as Spectrum does, or across all types"
    )
    budget: float = Field(
        0.0,
        ge=0,
        le=4,
        description="Trainable parameters as a share of plain QLoRA's at the same rank: sets the ranks "
        "(alors: in proportion to the signal); 0 leaves them as given",
    )
    calibration_batches: int = Field(8, ge=2, description="Batches for the gradient sketches")
    calibration_rows: int = Field(8, ge=1, description="Rows in each of these batches")
    sketch_size: int = Field(128, ge=4, description="Side of the two-sided gradient sketch")
    rank: int = Field(16, ge=1, description="LoRA rank r (qlora, hybrid, sgm, random; qlora_half about half)")
    alpha_over_rank: float = Field(
        2.0, gt=0, le=1000, description="LoRA alpha divided by rank, the same for every module"
    )
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="Plain LoRA, rank-stabilised LoRA (alpha / sqrt(r)), or weight-decomposed LoRA"
    )
    rank_high: int = Field(16, ge=1, description="alors: rank of the high tier")
    rank_low: int = Field(8, ge=1, description="alors: rank of the medium tier")
    high_percent: float = Field(30.0, ge=0, le=100, description="alors: share of a type in the high tier")
    medium_percent: float = Field(40.0, ge=0, le=100, description="alors: share of a type in the medium tier")
    high_lr: float = Field(
        1.5,
        gt=0,
        le=1000,
        description="alors: learning rate of the trained module with the strongest signal over that of the weakest",
    )
    similarity_of: Literal["subspace", "gradient"] = Field(
        "subspace",
        description="sgm: compare the leading gradient subspaces on the side that faces the residual stream, and share "
        "A or B there; or the cosines of whole gradients of one type, and share both",
    )
    overlap: float = Field(
        0.3,
        ge=0,
        le=1,
        description="sgm by subspace: lowest overlap inside a group, which also is above that of random subspaces",
    )
    group_layers: int = Field(
        2, ge=1, description="sgm by subspace: how many neighbouring layers a group may span"
    )
    group_within: Literal["part", "block"] = Field(
        "part",
        description="sgm by subspace: share within attention and within the MLP, whose matrices read one input each, or "
        "across whole blocks",
    )
    group_sides: Literal["input", "both"] = Field(
        "input",
        description="sgm by subspace: share A where the input faces the residual stream, or B as well where the output "
        "does (o, down)",
    )
    spend_savings: bool = Field(
        False,
        description="sgm: raise the rank by what sharing saves, up to hybrid's parameters, instead of training fewer",
    )
    similarity: float = Field(
        0.05, ge=-1, le=1, description="sgm by gradient: lowest gradient cosine inside a group"
    )
    gradient_init: Switch = Field(
        "auto",
        description="Start A from the leading directions of the gradient instead of at random; auto: where "
        "the signal or sgm measures gradients anyway",
    )

    @property
    def needs_gradients(self) -> bool:
        """Whether the signal is read from the task's gradients."""
        return self.signal != "spectrum"


class TrainSettings(_Section):
    max_steps: int = Field(200, ge=1, description="Optimizer steps per round")
    batch_size: int = Field(8, ge=1, description="Rows per forward pass, of all processes together")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step")
    learning_rate: float = Field(2e-3, gt=0, le=10, description="Base learning rate")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps spent warming up")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule after warm-up"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW, or bitsandbytes' 8-bit AdamW, paged or not (CUDA only)"
    )
    lora_plus_ratio: float = Field(
        1.0, gt=0, le=1000, description="Learning rate of B over that of A (LoRA+, arXiv 2402.12354)"
    )
    weight_decay: float = Field(0.0, ge=0, le=100, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input")
    evaluations: int = Field(5, ge=1, description="Evaluations during training; the best adapter is kept")
    gradient_checkpointing: Annotated[Literal["auto", "on", "some", "off"], BeforeValidator(_switch)] = Field(
        "auto",
        description="Recompute activations to save memory, of every block or, with some, of every second; "
        "auto is on for CUDA devices, and for alors everywhere",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=1000,
        description="Machines that train together, on a cluster with Kubeflow Trainer; they meet at "
        "checkpoint.destination",
    )
    processes: int = Field(
        0,
        ge=0,
        description="Training processes of each machine; 0 is one per GPU, or one where there is none",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="With several processes: the 4-bit base complete in each, or its blocks sharded"
    )


class EvaluateSettings(_Section):
    batch_size: int = Field(16, ge=1, description="Rows per evaluation pass")
    accuracy_rows: int = Field(64, ge=0, description="Rows scored by generation; 0 turns accuracy off")
    max_new_tokens: int = Field(
        24, ge=1, description="Longest generated answer; longer references are not scored"
    )
    update_energy: float = Field(
        0.95, gt=0, le=1, description="Share of an update's energy that its rank must hold"
    )


def _address(value: str) -> str:
    if value and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", value):
        raise ValueError("an address such as s3://bucket/prefix, or nothing")
    return _without_secret(value)


AddressOrNothing = Annotated[str, AfterValidator(_address)]


class CheckpointSettings(_Section):
    destination: AddressOrNothing = Field(
        "", description="s3:// address for training checkpoints, so that they outlive the pod"
    )
    folder: str = Field(
        "",
        description="Local folder of training checkpoints; empty is the work directory, or a pod's scratch",
    )
    every_steps: int = Field(0, ge=0, description="Steps between checkpoints; 0 goes by time alone")
    every_minutes: float = Field(
        10.0,
        ge=0,
        description="Minutes between checkpoints; 0 goes by steps alone. submit and schedule take 3 unless it is given",
    )
    keep: int = Field(2, ge=1, description="How many of a training's newest checkpoints are kept")


class ExportSettings(_Section):
    destination: AddressOrNothing = Field(
        "", description="s3:// address where the winner is published, as the folders merged and adapter"
    )
    signature: Literal["optional", "required"] = Field(
        "optional",
        description="Whether a model without a signature may be exported and become champion; the model card says "
        "which it is",
    )


class TrackingSettings(_Section):
    uri: str = Field("", description="MLflow tracking URI; empty is SQLite in the work directory")
    experiment: str = Field("spectraqlora", description="MLflow experiment")
    registered_model: str = Field("spectraqlora", description="Name in the MLflow model registry")
    registered_form: Literal["merged", "adapter"] = Field(
        "merged",
        description="Register the merged weights, or the adapter with a reference to the base (hub id or folder)",
    )
    patience_seconds: float = Field(
        60.0, ge=0, le=3600, description="How long a finished step waits for an MLflow that does not answer"
    )

    @field_validator("registered_model", "experiment")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value.strip() or len(value) > 200 or any(c in value for c in "/:.%\"'`"):
            raise ValueError("a name of at most 200 characters without / : . % or quotes")
        return value

    @field_validator("uri")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        if holds_secret(value):
            raise ValueError(
                "an address without user, password or token; these belong into MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or _TOKEN; those of a database into its own variables, such as PGPASSFILE"
            )
        return value


HIGHER_IS_BETTER = frozenset({"accuracy", "train_tokens_per_second"})
LOWER_IS_BETTER = frozenset(
    {
        "merged_test_loss",
        "merged_eval_loss",
        "eval_loss",
        "perplexity",
        "guard_perplexity",
        "trainable_parameters",
    }
    | {"train_seconds", "peak_memory_bytes"}
)


class PromoteSettings(_Section):
    enabled: bool = Field(
        True, description="Let the gate decide after register; off leaves that to `spectraqlora promote`"
    )
    metric: str = Field(
        "auto",
        description="What must be better, of the registered model unless named otherwise; auto is merged_test_loss, where "
        "there are no test rows merged_eval_loss",
    )
    margin: float = Field(0.0, ge=0, description="The metric must be better by more than this")
    guards: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Metrics that may get worse by at most this share of the champion's value"
    )
    guard_data: Where = Field(
        "",
        description="General text (.txt, or data as in data.source) on which both models' perplexity is "
        "measured; empty turns this guard off",
    )
    guard_bound: float = Field(
        0.05, ge=0, description="Perplexity on guard_data may grow by at most this share"
    )
    guard_rows: int = Field(100, ge=1, description="Use at most this many rows of guard_data")

    @property
    def bounds(self) -> dict[str, float]:
        """All guard metrics with the share by which each may get worse."""
        return {**self.guards, **({"guard_perplexity": self.guard_bound} if self.guard_data else {})}

    def check_measured(self) -> None:
        """Refuse metrics that no run of this pipeline logs."""
        known = HIGHER_IS_BETTER | LOWER_IS_BETTER
        for key, name in [
            *([("promote.metric", self.metric)] if self.metric != "auto" else []),
            *(("promote.guards", name) for name in self.guards),
        ]:
            if name not in known:
                raise InputError(key, name, f"a metric that runs have, one of: {', '.join(sorted(known))}")


class RetrainSettings(_Section):
    method: MethodName = Field("hybrid", description="The branch that retraining runs")
    start: Literal["base", "champion"] = Field(
        "base",
        description="Start from a fresh adapter, or from the champion's where it has the same method and base",
    )


class Settings(_Section):
    """All settings of a run; each section is one parameter of the pipeline."""

    methods: tuple[MethodName, ...] = Field(
        ("qlora", "hybrid", "alors", "sgm", "qlora_half"), description="Branches to run"
    )
    rounds: int = Field(1, ge=1, le=8, description="Rounds of train and re-evaluate")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of everything random")
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    snr: SnrSettings = SnrSettings()
    select: SelectSettings = SelectSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    tracking: TrackingSettings = TrackingSettings()
    promote: PromoteSettings = PromoteSettings()
    retrain: RetrainSettings = RetrainSettings()

    @field_validator("methods", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("methods")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("at least one method, each named once")
        return value


def _check_numbers(values: Any, section: type[BaseModel], prefix: str) -> None:
    """Refuse yes and no where a number is meant: they would be 1 and 0 (InputError)."""
    for name, field in section.model_fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        inner = field.annotation
        if isinstance(value, bool) and inner in (int, float):
            raise InputError(f"{prefix}{name}", value, "a number")
        if isinstance(inner, type) and issubclass(inner, _Section):
            _check_numbers(value, inner, f"{prefix}{name}.")


def parse(values: dict[str, Any]) -> Settings:
    """Validate a nested mapping; the first fault becomes one `InputError` naming key, value, expectation."""
    _check_numbers(values, Settings, "")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = [name for name, _, _ in reference()]
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"such as {', '.join(close)}; " if close else ""
            raise InputError(
                key, fault["input"], f"a known setting, {hint}`spectraqlora settings` lists them"
            ) from None
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise InputError(key, fault["input"], message) from None


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "seed": {
        "rounds": 2,
        "select": {"signal": "spectrum"},
        "train": {"learning_rate": 2e-4, "optimizer": "adamw", "gradient_checkpointing": "on"},
    },
}
"""Settings by one word: ours, and the methods as they were first published, where the weights' SNR decides."""


def preset(name: str) -> dict[str, Any]:
    """A preset's settings, as a nested mapping of what it changes.

    Raises:
        InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError("--preset", name, " or ".join(PRESETS))
    values: dict[str, Any] = json.loads(json.dumps(PRESETS[name]))
    return values


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both say something, the second does."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def with_overrides(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `section.key=value` assignments (YAML values) to a nested mapping; returns a new mapping.

    Nothing after the sign is the empty text, as a shell's `--set data.source=` means it; `null` is YAML's null.
    """
    result: dict[str, Any] = json.loads(json.dumps(values))
    for assignment in assignments:
        key, separator, raw = assignment.partition("=")
        if not separator or not re.fullmatch(r"[^.]+(\.[^.]+)*", key.strip()):
            raise InputError("--set", assignment, "section.key=value, for example train.max_steps=50")
        node = result
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError("--set", assignment, "a key whose parent is a section")
        try:
            node[leaf] = read_yaml(raw) if raw.strip() else ""
        except ValueError as error:
            raise InputError(key, raw, f"a YAML value ({error})") from None
        # YAML 1.1 reads 1e-3 as text; numbers written that way are meant as numbers.
        if isinstance(node[leaf], str):
            with contextlib.suppress(ValueError):
                node[leaf] = float(node[leaf])
    return result


def reference() -> list[tuple[str, str, str]]:
    """Every setting as (key, default, description), in order of declaration."""
    rows: list[tuple[str, str, str]] = []
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        if isinstance(default, _Section):
            for key, inner in type(default).model_fields.items():
                rows.append((f"{name}.{key}", json.dumps(inner.get_default()), inner.description or ""))
        else:
            shown = ",".join(default) if isinstance(default, tuple) else json.dumps(default)
            rows.append((name, shown, field.description or ""))
    return rows


def digest(settings: Settings) -> str:
    """SHA-256 over the canonical JSON of the settings."""
    return hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
