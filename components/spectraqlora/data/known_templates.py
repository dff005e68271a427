"""Chat templates for models that have none: by a known family's name, or from a file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from spectraqlora.data.chat_template import ChatTemplate
from spectraqlora.errors import InputError

_FOLDER = Path(__file__).with_name("templates")
KNOWN = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
"""Families whose templates are here."""
_FIELD = "data.chat_template"
_PACKED = "base64:"


def portable(value: str) -> str:
    """A setting that needs no file any more, so that it holds in another process or on another machine.

    A file's text is packed, because pipelines and workflows have a meaning of their own for Jinja's braces.

    Raises:
        InputError: neither a known family's name nor a file with a Jinja template.
    """
    if not value or value in KNOWN or value.startswith(_PACKED):
        return value
    try:
        text = Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if "{{" not in text and "{%" not in text:
        raise InputError(_FIELD, value, f"a file with a Jinja template, or one of {', '.join(KNOWN)}")
    return _PACKED + base64.b64encode(text.encode()).decode()


def template_text(value: str) -> str:
    """The Jinja text of a setting: a known family's name, or a file.

    Raises:
        InputError: none of these.
    """
    value = portable(value)
    if value in KNOWN:
        return (_FOLDER / f"{value}.jinja").read_text(encoding="utf-8")
    return base64.b64decode(value.removeprefix(_PACKED)).decode()


def give_template(tokenizer: Any, value: str) -> None:
    """Let a tokenizer have the template of a setting.

    Raises:
        InputError: there is no such template, it renders nothing, or it ends answers by a text that is no token of the
            model's, so that the model would not stop where they end.
    """
    tokenizer.chat_template = template_text(value)
    template = ChatTemplate(tokenizer)
    if not template.renders:
        raise InputError(_FIELD, _short(value), "a template that renders a user's and an assistant's message")
    end = template.end.strip()
    if end and template.turn_end is None:
        raise InputError(
            _FIELD,
            _short(value),
            f"a template whose end of an answer, {end!r}, is a token of the model's; zephyr, vicuna and llama-2 end "
            "answers with the model's own",
        )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:60]}…"
