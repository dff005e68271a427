"""How much memory every step takes, from a model's config and the settings alone.

Training a 4-bit model with LoRA adapters takes, with b bytes per number of the compute type:

    weights      n/2 packed + n/64 block scales + n/16384 · 4 scales of scales, for the n 4-bit parameters,
                 and b for each of the others (embeddings, norms, head)
    adapters     4 each (float32); their gradients 4 each; AdamW's two moments 8 each (8-bit: 2)
    activations  what the forward pass keeps for the backward pass: counted, not guessed, by running the
                 model's own code on tensors without storage (meta device). With gradient checkpointing one
                 input per block, and all tensors of the block that runs again
    working set  the largest dequantized weight and the gradients of one block's widest tensors
    loss         hidden states that count, and one chunk of logits (see head_loss)

`plan` gives one line per step and method; training's figure is compared with measured peaks by a test. With a
GPU the figures are allocations on it, and what its host needs beside; without one all of it is main memory.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import psutil

from spectraqlora.artifacts import LinearModule, RankMap
from spectraqlora.errors import InputError
from spectraqlora.methods.catalogue import method as method_of
from spectraqlora.methods.ranks import by_type
from spectraqlora.models.families import auto_class, context_length, replaced
from spectraqlora.models.modules import candidates, linear_modules
from spectraqlora.settings import Settings
from spectraqlora.signals.scores import Scores

if TYPE_CHECKING:
    import torch

GIB = 2**30
GPU_RESERVE_BYTES = 600 * 2**20
"""CUDA context and libraries on the device."""
GPU_RESERVE_SHARE = 0.05
"""Of the device, for fragmentation of its memory."""
PROCESS_BYTES = 900 * 2**20
"""Resident memory of a step's process before it loads anything."""
CUDA_PROCESS_BYTES = 3 * GIB
"""The same where CUDA's libraries are loaded."""
_SCAN_BYTES = 600 * 2**20
"""Of the SNR scan, besides six times its largest matrix (see snr.scan)."""
_SHARD_BYTES = 50 * 10**9
"""Most that transformers writes into one file, and holds in main memory for it."""
_BLOCK, _SCALE_BLOCK = 64, 256
_FLOAT32 = 4
_LOGITS = 2 * _FLOAT32
"""Per logit of a loss without gradient: itself and its logarithm after softmax."""
_WORKING_TENSORS = 3
"""Gradients as wide as the widest tensor of a block that are alive at once in its backward pass."""

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "65b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Llama shapes that `plan` knows by name (7B, 13B and 65B of the first Llama, 70B of the second)."""


def config_of(source: str, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The transformers config of a shape's name (7B, 13B, 65B, 70B), a folder, or a hub id.

    Raises:
        InputError: it is none of these, or the hub cannot be reached.
    """
    from transformers import AutoConfig, LlamaConfig

    if source.lower() in SHAPES:
        return LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **SHAPES[source.lower()])
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "model.base_model",
            source,
            f"a model folder or a reachable hub id ({str(error).splitlines()[0]}), "
            f"or for the command plan {', '.join(name.upper() for name in SHAPES)}",
        ) from None


class Outline:
    """A model without its weights: what memory depends on.

    Args:
        config: transformers config.
        dtype_bytes: bytes per number of the compute type, 2 or 4.

    Raises:
        InputError: it is no language model that generates text, or nothing in it can get an adapter.
    """

    def __init__(self, config: Any, dtype_bytes: int) -> None:
        self.config, self.dtype_bytes = config, dtype_bytes
        model = self.build()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.largest_tensor = max(p.numel() for p in model.parameters())
        linear = linear_modules(model)
        self.four_bit = sum(m.out_features * m.in_features for m in linear)
        self.modules: list[LinearModule] = candidates(model, config.model_type)
        self.largest = max(m.out_features * m.in_features for m in linear)
        self.widest = max(max(m.out_features, m.in_features) for m in linear)
        embeddings = model.get_input_embeddings().weight
        self.vocabulary, self.hidden = (int(side) for side in embeddings.shape)

    def row_tokens(self, settings: Settings) -> int:
        """Tokens of a full row: data.max_length, or all that the model has positions for."""
        return min(settings.data.max_length, context_length(self.config) or settings.data.max_length)

    def build(self) -> Any:
        """The model on the meta device, unquantized: its modules and shapes are those of the 4-bit one."""
        import torch

        dtype = torch.bfloat16 if self.dtype_bytes == 2 else torch.float32
        try:
            with torch.device("meta"):
                model = auto_class(self.config).from_config(self.config, dtype=dtype)
        except (ValueError, KeyError) as error:
            raise InputError(
                "model.base_model",
                self.config.model_type,
                f"a language model that generates text ({str(error).splitlines()[0]})",
            ) from None
        return model.train()

    @cached_property
    def weight_bytes(self) -> int:
        """The 4-bit model: packed weights, scales, scales of scales, and what stays unquantized."""
        blocks = math.ceil(self.four_bit / _BLOCK)
        constants = blocks + math.ceil(blocks / _SCALE_BLOCK) * _FLOAT32
        return math.ceil(self.four_bit / 2) + constants + self.dtype_bytes * (self.parameters - self.four_bit)

    @property
    def plain_bytes(self) -> int:
        """The whole model in its compute type."""
        return self.dtype_bytes * self.parameters

    def working(self, positions: int) -> int:
        """The largest weight, dequantized, and the widest tensors of a block's forward or backward pass."""
        return self.dtype_bytes * (self.largest + _WORKING_TENSORS * positions * self.widest)

    def loss(self, positions: int) -> int:
        """Hidden states, their gradient, and one chunk of logits with its softmax and gradient."""
        from spectraqlora.scoring.head_loss import CHUNK_BYTES

        chunk = min(max(1, CHUNK_BYTES // (_FLOAT32 * self.vocabulary)), positions) * self.vocabulary
        return 3 * positions * self.hidden * self.dtype_bytes + 3 * _FLOAT32 * chunk


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass."""

    blocks: tuple[int, ...]
    """Of every decoder block, in order."""
    outside: int
    """Of everything else: embeddings, last norm."""
    inputs: tuple[int, ...]
    """Of every block's input alone: what gradient checkpointing keeps."""
    again: tuple[int, ...]
    """Of every block when it runs again in the backward pass, where elementwise results are kept as well."""

    def with_recomputation(self, every: int) -> tuple[int, int]:
        """What is kept when every `every`-th block runs again (0: none), and what the largest of those then adds."""
        chosen = range(0, len(self.blocks), every) if every else range(0)
        kept = [self.inputs[i] if i in chosen else block for i, block in enumerate(self.blocks)]
        return self.outside + sum(kept), max((self.again[i] for i in chosen), default=0)


def kept_activations(model: Any, rows: int, tokens: int, padded: bool, cuda: bool) -> Kept:
    """Count what the forward pass of a model on the meta device would keep.

    Args:
        model: with adapters attached where they would be; frozen weights keep nothing of their inputs.
        rows: rows per forward pass.
        tokens: tokens per row.
        padded: rows have different lengths, so that attention gets a mask; it then repeats grouped keys and
            values for every head.
        cuda: for a GPU, whose fused attention also serves dropout.
    """
    import torch

    from spectraqlora.models.activations import recomputed

    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    parameters |= {b.untyped_storage()._cdata for b in model.buffers()}
    seen: dict[tuple[bool, int], Any] = {}
    counts: Counter[int | None] = Counter()
    remade: Counter[int | None] = Counter()
    inputs: dict[int, int] = {}
    current: list[int | None] = [None]

    def pack(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        known = (recomputed(tensor), storage._cdata)
        if storage._cdata not in parameters and known not in seen:
            seen[known] = storage
            (remade if known[0] else counts)[current[0]] += storage.nbytes()
        return None

    def enter(index: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current[0] = index
            hidden = args[0] if args else kwargs["hidden_states"]
            inputs[index] = hidden.numel() * hidden.element_size()

        return hook

    def leave(*_: Any) -> None:
        current[0] = None

    blocks = _blocks(model)
    handles: list[Any] = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    try:
        with (
            _without_numbers(padded, cuda),
            replaced(model.get_output_embeddings(), "forward", lambda hidden: hidden),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept),
        ):
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Kept(
        blocks=tuple(counts[index] for index in range(len(blocks))),
        outside=counts[None],
        inputs=tuple(inputs[index] for index in range(len(blocks))),
        again=tuple(counts[index] + remade[index] for index in range(len(blocks))),
    )


def _blocks(model: Any) -> list[Any]:
    """The numbered blocks: items of the outermost module lists."""
    from torch import nn

    found: list[Any] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(prefix) for prefix in outer):
            outer.append(f"{name}.")
            found += list(module)
    return found


@contextlib.contextmanager
def _without_numbers(padded: bool, cuda: bool) -> Iterator[None]:
    """Let a model run on tensors that have no numbers.

    Attention keeps what fused kernels keep: query, key, value, mask, result and one number per row and head.
    Where no fused kernel serves (dropout on a CPU, keys that are broadcast over heads) its parts are counted.
    """
    import torch
    from transformers import masking_utils

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
            rows, heads, tokens, _ = query.shape
            # Kernels write tokens before heads: the transposed result needs no copy.
            out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
            normaliser = query.new_empty(rows, heads, tokens, dtype=torch.float32)
            # A mask of booleans is turned into numbers for every layer anew.
            kept = mask if mask is None or mask.dtype == query.dtype else mask.to(query.dtype)
            ctx.save_for_backward(query, key, value, out, normaliser, kept)
            return out

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **more: Any,
    ) -> Any:
        grouped = key.shape[1] != query.shape[1] and not more.get("enable_gqa")
        if grouped or (dropout_p > 0 and not cuda):
            parts = torch.ops.aten._scaled_dot_product_attention_math
            causal = bool(more.get("is_causal", False))
            return parts(
                query, key, value, attn_mask, dropout_p, causal, enable_gqa=bool(more.get("enable_gqa"))
            )[0]
        return Fused.apply(query, key, value, attn_mask)

    with (
        replaced(torch.nn.functional, "scaled_dot_product_attention", attention),
        # Experts: any one of them has the result's shape.
        replaced(torch.nn.functional, "grouped_mm", lambda rows, experts, **_: rows @ experts[0]),
        replaced(masking_utils, "find_packed_sequence_indices", lambda *_: None),
        replaced(masking_utils, "fast_all", lambda *_: not padded),
        replaced(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: not padded),
    ):
        yield


@dataclass(frozen=True)
class Training:
    """Memory of one train step, bytes, by what takes it."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept at the start of the backward pass."""
    block: int
    """Kept beside them by the block that gradient checkpointing makes again; 0 without it."""
    working: int
    loss: int
    probe: int
    """Logits of one row, made once before the first step, to compare the model's own loss with ours."""

    @property
    def total(self) -> int:
        """The peak: the first step's probe, the loss, or a block's backward pass, which never meet."""
        fixed = self.weights + self.adapters + self.gradients + self.optimizer
        steps = fixed + self.activations + max(self.block + self.working, self.loss)
        return max(steps, self.weights + self.adapters + self.probe)

    @property
    def above_weights(self) -> int:
        """The peak above the loaded model."""
        return self.total - self.weights


def surrogate_map(method: str, outline: Outline, settings: Settings) -> RankMap:
    """The rank map of a method before anything was measured, at the most that it can cost.

    Which modules have signal is not known yet. They are spread over the layers, different ones for different
    types, the first layer's among them: gradients then flow through the whole model, and few modules share
    an input that is kept. For sgm every module gets its own pair: the groups come later.
    """
    types = {kind: index for index, kind in enumerate(by_type(outline.modules))}
    scores: Scores = {}
    for info in outline.modules:
        # Multiples of the golden ratio, modulo one, spread evenly.
        spread = (0.618034 * (info.layer + 1) + 0.381966 * types[info.type]) % 1 + 0.001
        scores[info.module] = (spread + (info.layer == 0), spread)
    return method_of(method).first_ranks(outline.modules, scores, settings.select, settings.seed, {})


def training(outline: Outline, ranks: RankMap, settings: Settings, cuda: bool) -> Training:
    """Memory of training a rank map's adapters with batches of full rows."""
    from spectraqlora.models import adapters
    from spectraqlora.models.activations import every_nth

    model = adapters.attach(outline.build(), ranks, settings.train.lora_dropout)
    rows, tokens = settings.train.batch_size, outline.row_tokens(settings)
    kept = kept_activations(model, rows, tokens, padded=not settings.data.pack, cuda=cuda)
    count = adapters.trainable_parameters(model)
    activations, block = kept.with_recomputation(every_nth(settings.train.gradient_checkpointing, cuda))
    moments = 2 * (_FLOAT32 if settings.train.optimizer == "adamw" else 1)
    return Training(
        weights=outline.weight_bytes,
        adapters=_FLOAT32 * count,
        gradients=_FLOAT32 * count,
        optimizer=moments * count,
        activations=activations,
        block=block,
        working=outline.working(rows * tokens),
        loss=outline.loss(rows * tokens),
        probe=tokens
        * outline.vocabulary
        * (_LOGITS + (outline.dtype_bytes if outline.dtype_bytes == 2 else 0)),
    )


@dataclass(frozen=True)
class Need:
    """What one step takes at its peak, bytes."""

    step: str
    method: str
    """Empty where all methods share the step."""
    device: int
    """On the GPU where there is one, else in main memory."""
    host: int
    """In main memory beside a GPU."""
    largest: str
    """What takes most of it."""

    @property
    def label(self) -> str:
        """The step, with its method where it has one."""
        return f"{self.step} ({self.method})" if self.method else self.step


@dataclass(frozen=True)
class Plan:
    """Memory of all steps of a run."""

    outline: Outline
    settings: Settings
    cuda: bool
    needs: tuple[Need, ...]

    def changes(self, need: Need, available: int) -> tuple[str, int]:
        """What to change so that a step fits, as --set assignments or a sentence, and what it then takes.

        Settings that cost time come before those that change what is learned.
        """
        settings, made = self.settings, []
        for key, values in _remedies(self, need):
            for value in values:
                changed = _with(settings, {key: value})
                if key == "train.batch_size":
                    passes = settings.train.gradient_accumulation * settings.train.batch_size // int(value)
                    changed = _with(changed, {"train.gradient_accumulation": passes})
                least = _need(self.outline, changed, self.cuda, need.step, need.method)
                if least.device >= need.device:
                    continue
                settings, need = changed, least
                if least.device <= available:
                    break
            made = _assignments(self.settings, settings)
            if need.device <= available:
                return " ".join(made), need.device
        gib = math.ceil(need.device / GIB)
        if need.step == "merge-export" and self.cuda:
            made = ["no GPU for this step, and"]
        elif self.cuda:
            made = [*made, "and a GPU of" if made else "a GPU of"]
        return " ".join([*made, f"{gib} GiB of memory"]), need.device


def plan_for(source: str, settings: Settings, gpu_bytes: int) -> tuple[Plan, int]:
    """The plan of a run with the base model `source`, and the bytes that a step has.

    Args:
        source: name of a shape, model folder, or hub id.
        settings: of the run.
        gpu_bytes: memory of the GPU; 0 is none, and steps have this machine's main memory.

    Raises:
        InputError: as `config_of` and `Outline`.
    """
    choice = settings.model.compute_dtype
    short = choice in ("bfloat16", "float16") or (choice == "auto" and gpu_bytes > 0)
    config = config_of(source, settings.model.revision, settings.model.trust_remote_code)
    found = plan(Outline(config, 2 if short else 4), settings, cuda=gpu_bytes > 0)
    return found, available(gpu_bytes) if gpu_bytes else int(psutil.virtual_memory().total)


def plan(outline: Outline, settings: Settings, cuda: bool) -> Plan:
    """Memory of every step and method.

    Args:
        outline: of the base model.
        settings: of the run.
        cuda: whether steps run on a GPU.
    """
    needs = [_need(outline, settings, cuda, step, "") for step in ("quantize-load", "snr-analyze")]
    for method in settings.methods:
        steps = ("select-layers", "train", "re-evaluate")
        needs += [_need(outline, settings, cuda, step, method) for step in steps]
    return Plan(outline, settings, cuda, (*needs, _need(outline, settings, cuda, "merge-export", "")))


def available(device_bytes: int) -> int:
    """What a GPU of that size has for a step's tensors."""
    return int(device_bytes * (1 - GPU_RESERVE_SHARE)) - GPU_RESERVE_BYTES


def _need(outline: Outline, settings: Settings, cuda: bool, step: str, method: str) -> Need:
    process = CUDA_PROCESS_BYTES if cuda else 0
    idle = 0 if cuda else PROCESS_BYTES
    scored = _scoring(outline, settings)
    parts: dict[str, int]
    if step == "quantize-load":
        parts = {
            "4-bit weights": outline.weight_bytes,
            "largest tensor": 2 * outline.dtype_bytes * outline.largest_tensor,
        }
        process += min(outline.weight_bytes, _SHARD_BYTES) if cuda else 0
    elif step == "snr-analyze":
        scan = _SCAN_BYTES + 6 * _FLOAT32 * outline.largest
        return Need(step, method, 0 if cuda else scan, scan if cuda else 0, "largest matrices")
    elif step == "select-layers":
        if not method_of(method).measures_gradients(settings.select):
            return Need(step, method, 0 if cuda else idle, PROCESS_BYTES if cuda else 0, "libraries")
        parts = {"4-bit weights": outline.weight_bytes, **calibration(outline, settings, cuda)}
    elif step == "train":
        found = training(outline, surrogate_map(method, outline, settings), settings, cuda)
        fixed = found.adapters + found.gradients + found.optimizer
        between = found.weights + fixed + scored
        parts = {"4-bit weights": found.weights, "adapters, gradients, optimizer": fixed}
        if found.total >= between:
            parts["activations and loss"] = found.total - found.weights - fixed
        else:
            parts["evaluation"] = scored
        process += found.adapters
    elif step == "re-evaluate":
        # One after the other: scoring, the updated weights in float32, gradients where the signal needs them.
        turns = {"evaluation": max(scored, (_FLOAT32 + outline.dtype_bytes) * outline.largest)}
        if method_of(method).moves and settings.select.needs_gradients:
            turns["gradients"] = sum(calibration(outline, settings, cuda).values())
        parts = {
            "4-bit weights": outline.weight_bytes,
            "adapters": _FLOAT32 * _trainable(outline, settings, method),
            **{max(turns, key=lambda name: turns[name]): max(turns.values())},
        }
    else:
        parts = {
            "merged weights": outline.plain_bytes,
            "4-bit weights": outline.weight_bytes,
            "evaluation": scored,
        }
        process += min(outline.plain_bytes, _SHARD_BYTES) if cuda else 0
    return Need(step, method, idle + sum(parts.values()), process, max(parts, key=lambda name: parts[name]))


def _trainable(outline: Outline, settings: Settings, method: str) -> int:
    sides = {m.module: m.in_features + m.out_features for m in outline.modules}
    return sum(
        entry.rank * sides[entry.module] for entry in surrogate_map(method, outline, settings).active()
    )


def _scoring(outline: Outline, settings: Settings) -> int:
    """Working memory of scoring rows or generating answers; both keep every layer's keys and values."""
    longest = outline.row_tokens(settings)
    positions = settings.evaluate.batch_size * longest
    tokens = longest + (settings.evaluate.max_new_tokens if settings.evaluate.accuracy_rows else 0)
    text = outline.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or outline.hidden // text.num_attention_heads
    layers = max(m.layer for m in outline.modules) + 1
    past = 2 * layers * settings.evaluate.batch_size * tokens * heads * width * outline.dtype_bytes
    return outline.working(positions) + outline.loss(positions) + past


def calibration(outline: Outline, settings: Settings, cuda: bool) -> dict[str, int]:
    """Gradients of every module, sketched: activations, the model's own loss, sketches (see gradients)."""
    rows, tokens = settings.select.calibration_rows, outline.row_tokens(settings)
    side = settings.select.sketch_size
    sides = (m.in_features * min(side, m.out_features) for m in outline.modules)
    logits = rows * tokens * outline.vocabulary * (3 * _FLOAT32 + (4 if outline.dtype_bytes == 2 else 0))
    return {
        "activations": _watched(outline, rows, tokens, not settings.data.pack, cuda),
        "logits": logits,
        "sketches": 2 * _FLOAT32 * sum(sides),
        "working set": outline.working(rows * tokens),
    }


@lru_cache(maxsize=32)
def _watched(outline: Outline, rows: int, tokens: int, padded: bool, cuda: bool) -> int:
    """What a forward and backward pass keep in which every module's input and output gradient is watched."""
    from spectraqlora.signals.gradients import watch

    model = outline.build()
    candidates = {info.module for info in outline.modules}
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name in candidates:
            watch(module, lambda *_: None)
    return sum(kept_activations(model, rows, tokens, padded, cuda).with_recomputation(1))


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _remedies(found: Plan, need: Need) -> list[tuple[str, list[Any]]]:
    """Settings that lower a step's peak, each with values to try in order."""
    settings = found.settings
    evaluation = ("evaluate.batch_size", _halves(settings.evaluate.batch_size, 1))
    length = ("data.max_length", _halves(settings.data.max_length, 256))
    calibration = ("select.calibration_rows", _halves(settings.select.calibration_rows, 1))
    if need.step == "train":
        optimizer = [("train.optimizer", ["adamw_8bit"])] if found.cuda else []
        return [
            ("train.gradient_checkpointing", ["some", "on"]),
            evaluation,
            ("train.batch_size", _halves(settings.train.batch_size, 1)),
            *optimizer,
            length,
        ]
    if need.step == "select-layers":
        return [calibration, length]
    if need.step == "re-evaluate":
        return [evaluation, calibration, length]
    return [evaluation] if need.step == "merge-export" else []


def _with(settings: Settings, changes: dict[str, Any]) -> Settings:
    values = settings.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Settings.model_validate(values)


def _assignments(before: Settings, after: Settings) -> list[str]:
    """The --set arguments that lead from one to the other."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        f"--set {section}.{name}={value}"
        for section, values in new.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value != old[section][name]
    ]
