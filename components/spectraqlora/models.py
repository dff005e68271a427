"""Loading base models, 4-bit models and their linear modules; the choice of device and compute type."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectraqlora.artifacts import LinearModule, QuantizedModel
from spectraqlora.checkpoint import Checkpoint, Tensors
from spectraqlora.errors import InputError
from spectraqlora.families import auto_class, plain_linears, quantizable_t5
from spectraqlora.settings import is_address

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"\.(\d+)\.")


def device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(choice: str) -> torch.dtype:
    """The compute type of a setting; `auto` follows the hardware.

    On CPUs without bfloat16 instructions a QLoRA step is about 20 times slower in bfloat16 than in
    float32, and no CPU gains enough from it to be worth the lost digits: `auto` takes float32 there.
    """
    import torch

    if choice != "auto":
        dtype = getattr(torch, choice)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def peak_memory_bytes() -> int:
    """Peak GPU memory allocated where there is a GPU, else this process's peak resident memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def module_identity(name: str) -> tuple[int, str] | None:
    """(layer index, module type) of a dotted module path; None outside numbered layers.

    The type is what follows the first index, as in Spectrum; that of an encoder begins with `encoder.`.
    """
    match = _LAYER.search(name)
    if match is None:
        return None
    stack = "encoder." if name[: match.start()].split(".")[0] == "encoder" else ""
    return int(match.group(1)), stack + name[match.end() :]


def resolve_base(source: str, revision: str, content: str = "", trust_remote_code: bool = False) -> Path:
    """Local folder of a base model: the folder itself, or a copy from the hub or an s3:// address.

    `content` is what the address must still hold, as `storage.content_digest` says it. Code that a hub model
    brings is fetched only where it is trusted.
    """
    if is_address(source):
        from spectraqlora.storage import local_copy, parse_address

        return local_copy(parse_address(source, "model.base_model"), content)
    path = Path(source)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError("model.base_model", source, f"a folder or a reachable hub model ({first})") from None


def original_folder(manifest: QuantizedModel) -> Path:
    """Local folder of the model that was quantized; fetched again where another machine did that."""
    here = not is_address(manifest.source) and Path(manifest.source_path).is_dir()
    source = manifest.source_path if here else manifest.source
    return resolve_base(source, manifest.revision, manifest.source_content, manifest.trust_remote_code)


def original_tensors(manifest: QuantizedModel) -> Tensors:
    """Tensors of the model that was quantized; those at an s3:// address are read where they are.

    Raises:
        InputError: the original is not there any more, or is another one.
    """
    if not is_address(manifest.source):
        return Checkpoint(original_folder(manifest))
    from spectraqlora.storage import ObjectChanged, S3Checkpoint, content_digest, parse_address

    address = parse_address(manifest.source, "model.base_model")
    if content_digest(address) != manifest.source_content:
        raise ObjectChanged(
            "model.base_model", address, "the content that was quantized; it was replaced since"
        )
    return S3Checkpoint(address)


def linear_modules(model: torch.nn.Module) -> list[LinearModule]:
    """Every linear layer inside numbered blocks, by its own name and its unpacked shape."""
    import bitsandbytes as bnb
    import torch
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in model.named_modules():
        identity = module_identity(name)
        if identity is None:
            continue
        four_bit = isinstance(module, bnb.nn.Linear4bit)
        if isinstance(module, torch.nn.Linear):
            out_features, in_features = int(module.out_features), int(module.in_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = (int(side) for side in module.weight.shape)
        else:
            continue
        found.append(
            LinearModule(
                module=name,
                type=identity[1],
                layer=identity[0],
                out_features=out_features,
                in_features=in_features,
                four_bit=four_bit,
                transposed=Conv1D in (type(module), getattr(module, "source_cls", None)),
            )
        )
    return found


def model_outline(folder: Path, trust_remote_code: bool) -> list[LinearModule]:
    """Linear modules of a model from its config alone: no weights are read (meta device)."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = str(error).splitlines()[0]
        raise InputError(
            "model.base_model", folder, f"a language model that generates text ({first})"
        ) from None
    return candidates(model, folder)


def candidates(model: Any, source: object) -> list[LinearModule]:
    """The linear modules that may get an adapter.

    Raises:
        InputError: there are none.
    """
    from spectraqlora.adapters import adaptable

    modules = adaptable(model, linear_modules(model))
    if not modules:
        raise InputError(
            "model.base_model", source, "linear layers inside numbered decoder blocks; found none"
        )
    return modules


def load_quantized(folder: str | Path, on: str = "") -> tuple[Any, QuantizedModel]:
    """The 4-bit model on a device, by default the best one, in evaluation mode, with its manifest."""
    import torch
    from transformers import AutoConfig

    manifest = QuantizedModel.read(folder)
    path, trust = Path(folder) / "model", manifest.trust_remote_code
    with plain_linears(), quantizable_t5():
        model = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=trust)).from_pretrained(
            path,
            dtype=getattr(torch, manifest.compute_dtype),
            device_map={"": on or device()},
            trust_remote_code=trust,
        )
    without_cpu_packing(model)
    model.eval()
    return model, manifest


def without_cpu_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for its bfloat16 CPU kernel in evaluation mode.

    It fails unless the input width is a multiple of 64, and the numbers would depend on the machine.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """An unquantized model from safetensors on the best device."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        device_map={"": device()},
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model; padding falls back to the end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dequantized_weight(module: torch.nn.Module) -> torch.Tensor:
    """Weight of a linear layer as float32 (out x in), dequantized where it is packed."""
    import bitsandbytes as bnb

    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()
