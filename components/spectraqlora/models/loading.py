"""Loading base models, 4-bit models and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import FourBitModel, ModelOutline
from spectraqlora.errors import InputError
from spectraqlora.models.families import (
    auto_class,
    fused_experts,
    plain_linears,
    quantizable_t5,
    settle_tie,
)
from spectraqlora.models.hardware import device
from spectraqlora.models.inspection import attempted, check_loaded
from spectraqlora.models.modules import without_cpu_packing
from spectraqlora.models.plain import plain_folder
from spectraqlora.models.tensors import LocalTensors, Tensors
from spectraqlora.places import base_digest, base_place, check_links

if TYPE_CHECKING:
    import torch


def original_folder(manifest: ModelOutline) -> Path:
    """Local folder of the model that was quantized; fetched again where another machine did that.

    Raises:
        InputError: the original is not there any more, or is another one: its files are read and compared.
    """
    here = Path(manifest.source_path)
    if manifest.source_content or not here.is_dir():
        place = base_place(manifest.source, manifest.revision, manifest.trust_remote_code)
        # A hub's revision is the commit that was quantized.
        here = place.local_copy(manifest.source_content or (manifest.revision if place.kind == "hub" else ""))
    digest = base_digest(here, manifest.trust_remote_code)
    if digest != manifest.base_digest:
        raise InputError(
            "model.base_model",
            here,
            f"the model that was quantized, of digest {manifest.base_digest[:12]}; it was replaced since, and has "
            f"{digest[:12]}",
        )
    return here


def original_tensors(manifest: ModelOutline) -> Tensors:
    """Tensors of the model that was quantized; those at an s3:// address are read where they are.

    Raises:
        InputError: the original is not there any more, or is another one.
    """
    if not manifest.source_content:
        return LocalTensors(original_folder(manifest))
    from spectraqlora.models.remote_tensors import S3Tensors
    from spectraqlora.storage import ObjectChanged

    place = base_place(manifest.source)
    if place.digest() != manifest.source_content:
        raise ObjectChanged(place.field, place, "the content that was quantized; it was replaced since")
    return S3Tensors(place.address)


def load_four_bit(folder: str | Path, on: str = "") -> tuple[Any, FourBitModel]:
    """The 4-bit model on a device, by default the best one, in evaluation mode, with its manifest."""
    import torch
    from transformers import AutoConfig

    from spectraqlora.models.expert_loading import experts_in_four_bit

    manifest = FourBitModel.read(folder)
    path, trust = Path(folder) / "model", manifest.trust_remote_code
    with plain_linears(), quantizable_t5(), fused_experts(), experts_in_four_bit():
        model, info = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=trust)).from_pretrained(
            path,
            dtype=getattr(torch, manifest.compute_dtype),
            device_map={"": on or device()},
            trust_remote_code=trust,
            output_loading_info=True,
        )
    check_loaded(info, type(model).__name__, path)
    without_cpu_packing(model)
    model.eval()
    return model, manifest


def load_plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """An unquantized model from safetensors on the best device; packed weights are unpacked on the way.

    Raises:
        InputError: some of its weights are missing, and would be random.
    """
    from transformers import AutoConfig

    with plain_folder(folder) as plain:
        config = AutoConfig.from_pretrained(plain, trust_remote_code=trust_remote_code)
        model, info = auto_class(config).from_pretrained(
            plain,
            dtype=dtype,
            use_safetensors=True,
            device_map={"": device()},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    check_loaded(info, type(model).__name__, folder)
    settle_tie(model)
    return model


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False, place: object = None) -> Any:
    """The tokenizer of a model, with an end and a token to pad with.

    The end is what the tokenizer names, else what the generation config or the config do. Padding falls back to it, also
    where the tokenizer's own pad token has no row in the embedding.

    Args:
        folder: of the model.
        trust_remote_code: let code next to the model run.
        place: what messages call the folder; None is itself.

    Raises:
        InputError: there is no tokenizer, it does not load, or nothing names an end-of-sequence token.
    """
    folder = Path(folder)
    tokenizer = _own_tokenizer(folder, trust_remote_code, place)
    if tokenizer.eos_token_id is None:
        end = next((token for number in _end_ids(folder) if (token := _token(tokenizer, number))), None)
        if end is None:
            raise InputError(
                "model.base_model",
                f"{place or folder}/tokenizer_config.json",
                "an eos_token, or an eos_token_id in config.json: without one nothing ends an answer",
            )
        tokenizer.eos_token = end
    rows = _embedding_rows(folder)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def files_named_elsewhere(folder: Path, place: object = None) -> list[str]:
    """The tokenizer's settings that name one of its files: older transformers wrote where that was. None of them is followed.

    Raises:
        InputError: a setting that transformers does follow, out of the folder too; the export would hold what is there.
    """
    leftovers = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # Loading says it.
            continue
        for key, value in document.items() if isinstance(document, dict) else ():
            if key.endswith("_file") and key != "gguf_file" and name == "tokenizer_config.json":
                leftovers += [key] if value else []
                continue
            followed = {
                **dict.fromkeys(("vocab", "merges"), isinstance(value, str)),
                "init_inputs": True,
                "fast_tokenizer_files": value != ["tokenizer.json"],
            }.get(key, key.endswith("_file"))
            if value and followed:
                raise InputError(
                    "model.base_model", f"{place or folder}/{name}",
                    f"a tokenizer made of its folder's own files; {key} has others read: {value!r}",
                )  # fmt: skip
    return leftovers


def own_end_token(folder: Path, trust_remote_code: bool = False) -> str | None:
    """The end-of-sequence token that the tokenizer itself names; None where it names none."""
    token = _own_tokenizer(folder, trust_remote_code).eos_token
    return None if token is None else str(token)


def own_pad_token(folder: Path, trust_remote_code: bool = False) -> str | None:
    """The pad token that the tokenizer itself names; None where it names none."""
    token = _own_tokenizer(folder, trust_remote_code).pad_token
    return None if token is None else str(token)


def _embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding, as the config says; None where it does not."""
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    text = document.get("text_config") if isinstance(document, dict) else None
    for part in (document, text):
        if isinstance(part, dict) and type(part.get("vocab_size")) is int:
            return int(part["vocab_size"])
    return None


def _own_tokenizer(folder: Path, trust_remote_code: bool, place: object = None) -> Any:
    from transformers import AutoTokenizer

    check_links(folder, place)
    unread = dict.fromkeys(files_named_elsewhere(folder, place))  # None: the folder's own file, or none.
    return attempted(
        lambda: AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **unread
        ),
        place or folder,
        "a tokenizer, such as tokenizer.json with tokenizer_config.json",
    )


def _end_ids(folder: Path) -> list[int]:
    """End-of-sequence ids that the generation config and the config name, in this order."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        parts = [document, document.get("text_config")] if isinstance(document, dict) else []
        for part in parts:
            value = part.get("eos_token_id") if isinstance(part, dict) else None
            ids += [
                each
                for each in (value if isinstance(value, list) else [value])
                if type(each) is int and each >= 0
            ]
    return ids


def _token(tokenizer: Any, number: int) -> str | None:
    token = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    return str(token) if token else None


def stored_bytes(model: Any) -> int:
    """What a model's tensors take in a file; tensors that share their memory are there once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(storages.values())
