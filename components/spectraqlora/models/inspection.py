"""One look at a base model, before anything runs: what its files hold, what is converted, what is refused and why.

README.md next to this file has the table of outcomes. The look reads configs, tokenizer and the headers of the
weights, wherever they are: in a folder, on the hub, in object storage. Whether every part of the model has its weights is what
transformers' own loading says, on tensors without content.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spectraqlora.artifacts import LinearModule
from spectraqlora.errors import InputError
from spectraqlora.models.families import auto_class, context_length
from spectraqlora.models.headers import TYPES
from spectraqlora.models.tensors import LocalTensors, Tensors, quantization
from spectraqlora.places import ADAPTER_CONFIG, INDEX, WEIGHTS, HubAway, Place, read_document
from spectraqlora.runtime.console import quiet

T = TypeVar("T")
FIELD = "model.base_model"
_MOST = 4096
"""Layers, experts or heads beyond which a config is taken for damaged; published models have at most some hundreds."""
_LONGEST_CONTEXT = 1 << 27
_SHORTEST_CONTEXT = 8
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")
_PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Inspection:
    """What a base model is.

    Args:
        config: transformers' config, without `quantization_config`.
        modules: its linear modules that may get an adapter, each with its tensor's name in the checkpoint.
        dtype: of its weights, as torch calls it.
        lines: what is not taken as it stands, in words.
    """

    config: Any
    modules: list[LinearModule]
    dtype: str
    lines: list[str]


def inspect_base(place: Place, content: str = "") -> Inspection:
    """Look at a base model where it is; of one on the hub or in a bucket, only what describes it is fetched.

    Args:
        place: of the base model; the sample has to be made before.
        content: the hub's commit; empty takes the revision of the place.

    Raises:
        InputError: what makes it no base for training, in one line that names file and tensor.
    """
    if place.kind == "path":
        return inspect_folder(place.path, place.trusted, place)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder, names = place.description(Path(scratch) / "model", content)
            return _inspected(folder, names, lambda: _remote_tensors(place, content), place.trusted, place)
    except HubAway:
        if (copied := place.cached_copy(content)) is None:
            raise
        return inspect_folder(copied, place.trusted, place)


def inspect_folder(folder: Path, trusted: bool = False, place: object = None) -> Inspection:
    """Look at a base model in a folder.

    Args:
        folder: with its files.
        trusted: whether its own code may run.
        place: what messages call it; None is the folder.

    Raises:
        InputError: as `inspect_base`.
    """
    return _inspected(folder, _names(folder), lambda: LocalTensors(folder), trusted, place or folder)


def open_tensors(place: Place) -> Tensors:
    """The tensors of a base model, for measuring them: a folder's, a fetched hub model's, or where a bucket has them.

    Raises:
        InputError: no model folder, weights that are malformed or packed in a way that is not read; or, where the
            model is one that could be trained, what `inspect_base` says of its weights.
    """
    if place.kind == "s3":
        with tempfile.TemporaryDirectory() as scratch:
            folder, names = place.description(Path(scratch) / "model")
            tensors = _remote_tensors(place, "")
            _check_for_measuring(folder, names, tensors, place)
        return tensors
    folder = place.local_copy()
    names = _names(folder)
    check_names(place, names, place.trusted, _config_text(folder))
    local = LocalTensors(folder)
    _check_for_measuring(folder, names, local, place)
    return local


def _check_for_measuring(folder: Path, names: Collection[str], tensors: Tensors, place: Place) -> None:
    """Refuse weights that are not all of the model's, where it is a language model; others are measured as they are."""
    text = _config_text(folder)
    check_names(place, names, place.trusted, text)
    if not _is_known(text or "{}", place):
        return
    config = _config(folder, place.trusted, place)
    if type(config) in auto_class(config)._model_mapping:
        _check_sizes(config, tensors, place)
        _model_of(config, tensors, place.trusted, place)


def _is_known(config: str, place: object) -> bool:
    """Whether transformers has this kind of model; the weights of others can be measured all the same."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = read_document(config, f"{place}/config.json").get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(FIELD, folder, "an existing folder")
    paths = list(folder.iterdir())
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(
                FIELD, path, "a file or a folder; from this, a pipe or a device, nobody would read"
            )
    return [path.name for path in paths]


def _config_text(folder: Path) -> str | None:
    try:
        return (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def check_names(place: object, names: Collection[str], trusted: bool, config: str | None) -> None:
    """Refuse a model folder by the names of its files and the text of its `config.json`.

    Raises:
        InputError: no config or weights, an adapter, pickles only, other formats, or remote code needed.
    """
    if ADAPTER_CONFIG in names:
        raise InputError(
            FIELD, f"{place}/{ADAPTER_CONFIG}", "a base model; this folder holds a PEFT adapter. Merge it into its "
            "base (merge_and_unload) and name the result, or name the base"
        )  # fmt: skip
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    form = (
        f"; {gguf} is GGUF, of which no plain weights are kept: name the model that it was made from"
        if gguf
        else ""
    )
    if config is None:
        raise InputError(FIELD, place, f"a model folder; it has no config.json{form}")
    document = read_document(config, f"{place}/config.json")
    if document.get("auto_map") and not trusted:
        raise InputError(
            FIELD,
            place,
            "a model without code of its own; model.trust_remote_code=true runs it, if you trust it",
        )
    if document.get("transformers_weights") is not None:
        raise InputError(
            FIELD, f"{place}/config.json", f"weights in {WEIGHTS} or in {INDEX}'s files; it names others"
        )
    suffixes = {Path(name).suffix for name in names}
    if ".safetensors" in suffixes:
        return
    if suffixes & {".bin", ".pt", ".pth"}:
        raise InputError(
            FIELD,
            place,
            "safetensors; it holds pickled weights only, which can run code. Convert them where you trust "
            "them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW)",
        )
    raise InputError(FIELD, place, f"a model folder; it has no *.safetensors weights{form}")


def _inspected(
    folder: Path, names: Collection[str], tensors: Callable[[], Tensors], trusted: bool, place: object
) -> Inspection:
    check_names(place, names, trusted, _config_text(folder))
    if WEIGHTS not in names and INDEX not in names:
        raise InputError(FIELD, place, f"{WEIGHTS}, or {INDEX} and the files that it names")
    stored = tensors()
    lines = []
    packed = quantization(_config_text(folder), place)
    if packed and not stored.packed:
        raise InputError(
            FIELD, f"{place}/config.json", "weights that are packed, as its quantization_config says; none are: remove "
            "it, if the weights are whole without it"
        )  # fmt: skip
    if stored.packed:
        method = packed.get("quant_method", "bitsandbytes")
        lines.append(
            f"{len(stored.packings)} matrices are packed ({method}); their unpacked weights are the base"
        )
    config = _config(folder, trusted, place)
    _check_sizes(config, stored, place)
    model = _model_of(config, stored, trusted, place)
    modules = _modules(model, stored, place)
    context = context_length(config)
    if context is not None and not _SHORTEST_CONTEXT <= context <= _LONGEST_CONTEXT:
        raise InputError(
            FIELD,
            f"{place}/config.json",
            f"positions for {_SHORTEST_CONTEXT} tokens or more; it has {context}",
        )
    rows = int(model.get_input_embeddings().weight.shape[0])
    lines += _check_tokenizer(folder, trusted, rows, place)
    _check_ids(config, rows, place)
    return Inspection(config, modules, _dtype(config, stored), lines)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers neither logs nor warns: its reports are read, and become one line."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL + 1)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers_logging.enable_progress_bar()


def attempted(action: Callable[[], T], value: object, expected: str) -> T:
    """What an action on somebody's files returns; whatever it raises becomes one line.

    Raises:
        InputError: the action failed; `expected` with the error's first line.
    """
    try:
        with _quietly():
            return action()
    except InputError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception.
        first, *more = str(error).strip().splitlines() or [""]
        # "…validator 'validate_architecture':" says what in the line below.
        text = " ".join(" ".join([first, *more[: int(first.endswith(":"))]]).split())
        name = type(error).__name__
        reason = f"{name}: {text}" if text and not isinstance(error, ValueError) else text or name
        raise InputError(FIELD, value, f"{expected} ({reason[:300]})") from None


def _config(folder: Path, trusted: bool, place: object) -> Any:
    from transformers import AutoConfig

    config = attempted(
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True),
        f"{place}/config.json",
        "a language model that generates text",
    )
    config = copy.deepcopy(config)
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _check_sizes(config: Any, tensors: Tensors, place: object) -> None:
    """Refuse what no weights stand behind, before a model of that size is built, even without content.

    Raises:
        InputError: counts that are none, more layers than the weights have, a width that no tensor has.
    """
    where = f"{place}/config.json"
    for name, value in _numbers(config.to_dict()):
        counts = re.fullmatch(r"(num|n|encoder|decoder)_\w*(layers?|experts|heads?)", name)
        if counts and not 0 <= value <= _MOST:
            raise InputError(FIELD, where, f"{name} of 0 to {_MOST}; it is {value}")
        if re.search(r"(position|positions|seq_len)", name) and value > _LONGEST_CONTEXT:
            raise InputError(FIELD, where, f"{name} of at most {_LONGEST_CONTEXT}; it is {value}")
    text = attempted(lambda: config.get_text_config(decoder=True), where, "the config of a language model")
    sides = {side for name in tensors.names() for side in tensors.shape(name)}
    for name in ("hidden_size", "vocab_size"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width not in sides:
            raise InputError(
                FIELD, where, f"{name} of a tensor's side; it is {width}, and no tensor of {place} has it"
            )
    layers, stored = getattr(text, "num_hidden_layers", None), _stored_layers(tensors)
    if isinstance(layers, int) and stored and layers > stored:
        raise InputError(
            FIELD, where, f"as many layers as the weights have, {stored}; num_hidden_layers is {layers}"
        )


def _numbers(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every whole number of a config, with the key that it is under."""
    if isinstance(value, bool) or depth > 8:
        return
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key), depth + 1)


def _stored_layers(tensors: Tensors) -> int:
    """Numbered blocks that the tensors' names count, in the longest stack."""
    indices = [
        int(match[1]) for name in tensors.names() if (match := _NUMBERED.search(name)) and len(match[1]) < 9
    ]
    return max(indices, default=-1) + 1


def _model_of(config: Any, tensors: Tensors, trusted: bool, place: object) -> Any:
    """The model on tensors without content, loaded as transformers loads it.

    Raises:
        InputError: it is no language model that generates text, or weights are missing, left over, or of other
            shapes than the config's.
    """
    import torch

    where = f"{place}/config.json"
    kind = _class_of(config, trusted, where)
    state = {
        name: torch.empty(
            tensors.shape(name),
            dtype=getattr(torch, TYPES[tensors.dtype(name)].torch or "uint8"),
            device="meta",
        )
        for name in tensors.names()
    }

    def load() -> tuple[Any, dict[str, Any]]:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=state,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        return loaded

    model, info = attempted(load, where, "a model that transformers builds and fills with these weights")
    check_loaded(info, kind.__name__, place, tensors)
    _check_types(model, tensors, place)
    return model


def _check_types(model: Any, tensors: Tensors, place: object) -> None:
    """Refuse whole numbers and truth values where the model has a parameter; as buffers, such as masks, they stay."""
    parameters = {name for name, _ in model.named_parameters()}
    for name in tensors.names():
        kind = tensors.dtype(name)
        if kind not in _PLAIN and parameters & {name, f"{model.base_model_prefix}.{name}"}:
            raise InputError(
                FIELD,
                f"{place}/{tensors.file(name)}",
                f"{name} in {', '.join(_PLAIN)}; its numbers are {kind}",
            )


def check_loaded(info: dict[str, Any], kind: str, place: object, tensors: Tensors | None = None) -> None:
    """Refuse a model some of whose weights are random, left over, or of another shape, by name.

    Args:
        info: transformers' loading info.
        kind: the model's class.
        place: the folder, as messages name it.
        tensors: its tensors, to name files; None names the folder.

    Raises:
        InputError: naming the first tensor, and how many more there are.
    """

    def where(name: str) -> str:
        if tensors is None:
            return str(place)
        files = {
            tensors.file(stored) for stored in tensors.names() if stored == name or stored.endswith(name)
        }
        files = files or {*tensors.files.values()}
        return f"{place}/{files.pop()}" if len(files) == 1 else str(place)

    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if mismatched := sorted(info["mismatched_keys"], key=lambda item: str(item[0])):
        name, stored, wanted = mismatched[0]
        raise InputError(
            FIELD, where(name), f"{name} of shape {list(wanted)}, as the config says; it has {list(stored)}"
            f"{_more(mismatched)}"
        )  # fmt: skip
    if missing:
        raise InputError(
            FIELD,
            where(missing[0]),
            f"all weights of {kind}; it has no {missing[0]}{_more(missing)}, which would be random",
        )
    if extra:
        raise InputError(
            FIELD, where(extra[0]), f"weights of {kind} alone; {extra[0]}{_more(extra)} are none of its own"
            if len(extra) > 1 else f"weights of {kind} alone; {extra[0]} is none of its own"
        )  # fmt: skip


def _more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _class_of(config: Any, trusted: bool, where: str) -> Any:
    """The transformers class that loads a model of this config with its head."""
    import torch

    auto = auto_class(config)
    if type(config) in auto._model_mapping:
        kind = auto._model_mapping[type(config)]
        if isinstance(kind, type):
            return kind

    def built() -> type:
        with torch.device("meta"):
            return type(auto.from_config(config, trust_remote_code=trusted))

    return attempted(built, where, "a language model that generates text")


def _modules(model: Any, tensors: Tensors, place: object) -> list[LinearModule]:
    from spectraqlora.models.modules import candidates
    from spectraqlora.models.names import checkpoint_names

    stored = checkpoint_names(model, tensors.names())
    with quiet():  # quantize-load says which matrices stay without an adapter.
        modules = attempted(lambda: candidates(model, place), place, "layers that can get an adapter")
    return [info.model_copy(update={"tensor": stored.get(f"{info.module}.weight", "")}) for info in modules]


def _check_tokenizer(folder: Path, trusted: bool, rows: int, place: object) -> list[str]:
    """Refuse a tokenizer that does not load, cuts no text, has no end, or knows tokens without an embedding.

    Returns:
        What is completed or left out, in words.
    """
    from spectraqlora.models.loading import (
        files_named_elsewhere,
        load_tokenizer,
        own_end_token,
        own_pad_token,
    )

    tokenizer = load_tokenizer(folder, trusted, place)
    lines = []
    if keys := files_named_elsewhere(folder, place):
        lines.append(
            f"tokenizer_config.json: {', '.join(keys)} not followed; the tokenizer is the folder's own files"
        )
    own_pad = own_pad_token(folder, trusted)
    if own_pad not in (None, tokenizer.pad_token):
        lines.append(f"the pad token {own_pad!r} has no embedding; padding is {tokenizer.pad_token!r}")
    if own_end_token(folder, trusted) is None:
        lines.append(f"tokenizer_config.json names no eos_token; {tokenizer.eos_token!r} is the config's")
    vocabulary = attempted(tokenizer.get_vocab, f"{place}/tokenizer.json", "a tokenizer with a vocabulary")
    ids = attempted(
        lambda: tokenizer("The 3 quick foxes", add_special_tokens=False)["input_ids"],
        f"{place}/tokenizer.json",
        "a tokenizer that cuts text",
    )
    if not ids or len(vocabulary) < 2:
        raise InputError(
            FIELD,
            f"{place}/tokenizer.json",
            f"a tokenizer that cuts text into tokens; it has {len(vocabulary)} of them",
        )
    # Tokens that only pad, or stand for what no token stands for where bytes always do, are never in text.
    aside = {own_pad, tokenizer.unk_token} - {tokenizer.eos_token}
    surplus = sorted(
        (number, token) for token, number in vocabulary.items() if number >= rows and token not in aside
    )
    if surplus:
        lines += _without_embedding(tokenizer, surplus, rows, place)
    if tokenizer.chat_template:
        _check_template(tokenizer.chat_template, place)
    return lines


def _without_embedding(tokenizer: Any, surplus: list[tuple[int, str]], rows: int, place: object) -> list[str]:
    """Tokens of pictures and sounds, which a text model's tokenizer may share with its siblings, are never in text."""
    media = {
        str(token)
        for key, token in tokenizer.special_tokens_map.items()
        if re.match(r"(image|video|audio|boi|eoi|boa|eoa)_?token", key) and isinstance(token, str)
    }
    if all(token in media for _, token in surplus):
        return [f"{len(surplus)} tokens have no embedding ({surplus[0][1]!r}); a text model never sees them"]
    last = surplus[-1][0] + 1
    raise InputError(
        FIELD, place, f"an embedding for each token: tokenizer has {last} tokens, embeddings {rows}, so that "
        f"{surplus[0][1]!r} has none. Resize where tokens were added: model.resize_token_embeddings({last})"
    )  # fmt: skip


def _check_template(template: Any, place: object) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    texts = template.values() if isinstance(template, dict) else [template]
    for text in texts:
        attempted(
            lambda text=text: _compile_jinja_template(text),  # type: ignore[misc]
            f"{place}/chat_template.jinja",
            "a chat template in Jinja",
        )


def _check_ids(config: Any, rows: int, place: object) -> None:
    text = config.get_text_config(decoder=True)
    names = ["bos_token_id", "eos_token_id"] + (
        ["decoder_start_token_id"] if config.is_encoder_decoder else []
    )
    for name in names:
        value = getattr(text, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (not isinstance(number, int) or number >= rows):
                raise InputError(
                    FIELD, f"{place}/config.json", f"{name} of a token, below {rows}; it is {number!r}"
                )


def _dtype(config: Any, tensors: Tensors) -> str:
    """The type of most of the weights; of packed ones, what the config names."""
    sizes: Counter[str] = Counter()
    for name in tensors.names():
        if name not in tensors.packings and tensors.dtype(name) in _PLAIN:
            sizes[tensors.dtype(name)] += tensors.matrix_bytes(name)
    if sizes and not tensors.packed:
        return TYPES[sizes.most_common(1)[0][0]].torch
    named = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    return named if named in ("float32", "float16", "bfloat16") else "bfloat16"


def _remote_tensors(place: Place, content: str) -> Tensors:
    if place.kind == "s3":
        from spectraqlora.models.remote_tensors import S3Tensors

        return S3Tensors(place.address)
    from spectraqlora.models.remote_tensors import HubTensors

    # The hub's client lets errors of its HTTP library through.
    return attempted(
        lambda: HubTensors(place.text, content or place.revision, place),
        place,
        "a hub model whose files can be read",
    )
