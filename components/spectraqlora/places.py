"""What a base model or a data source is, and its copy on this machine."""

from __future__ import annotations

from pathlib import Path

from spectraqlora.errors import InputError
from spectraqlora.settings import is_address


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
