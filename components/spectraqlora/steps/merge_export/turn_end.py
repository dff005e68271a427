"""How the exported model ends its answers: as it has learned to."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from spectraqlora.artifacts import PreparedRows
from spectraqlora.data.chat_template import ChatTemplate
from spectraqlora.runtime.console import say
from spectraqlora.scoring.loss import stop_tokens


def end_turns(model: Any, tokenizer: Any, rows: PreparedRows) -> None:
    """Let a model and its tokenizer stop where the answers in its training rows end.

    The generation config names every token that ends an answer. The tokenizer's end of sequence becomes the one by
    which the chat template ends a turn, unless the template itself writes the end of sequence, which would change it.

    Args:
        model: to be exported.
        tokenizer: to be exported; has the chat template of the rows from here on.
        rows: what was learned.
    """
    if rows.chat_template:
        tokenizer.chat_template = rows.chat_template
    ends = stop_tokens(model, tokenizer, rows.turn_ends)
    if ends and model.generation_config is not None:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if not rows.turn_ends or not tokenizer.chat_template:
        return
    end, own = tokenizer.convert_ids_to_tokens(rows.turn_ends[0]), tokenizer.eos_token
    if end == own:
        return
    moment = datetime.now()
    before = ChatTemplate(tokenizer, moment).sample
    tokenizer.eos_token = end
    if ChatTemplate(tokenizer, moment).sample != before:
        tokenizer.eos_token = own
    say(
        f"answers end with {end}: in the generation config"
        + (" and the tokenizer" * (tokenizer.eos_token == end))
    )
