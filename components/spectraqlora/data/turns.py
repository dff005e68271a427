"""Which characters of a rendered conversation are learned: what the model has to write itself.

An answer begins where the template's own prompt for it ends, and ends with what the template writes to end it: the
answer's last words, then everything up to its first special token. Where the template says itself what the assistant
generates, by `{% generation %}`, that is taken.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spectraqlora.data.chat_template import ChatTemplate
from spectraqlora.data.dyes import REASONING, Dyed, dyed, looked_for
from spectraqlora.data.forms import Form, shape_of
from spectraqlora.data.rows import Message, RowRefused

TrainOn = Literal["assistant", "last", "all"]
Span = tuple[int, int]
Tools = list[dict[str, Any]] | None
_RESULTS = ("tool", "function", "ipython")
_REMEMBERED = 4096
"""Prompts' ends, and forms of conversations."""
_UNMASKED = "the template cannot be masked safely"


@dataclass(frozen=True)
class Learned:
    """A conversation as text.

    Args:
        text: as the template writes it.
        spans: characters that are learned, in order.
        turns: assistant's turns that are learned.
        unlearned: assistant's turns that are not, by reason.
        left_out: what the template does not write, by what it is.
    """

    text: str
    spans: list[Span]
    turns: int
    unlearned: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def learned(template: ChatTemplate, messages: list[Message], tools: Tools, train_on: TrainOn) -> Learned:
    """The conversation as text, with what is learned of it.

    Args:
        template: of the model.
        messages: in order.
        tools: functions that the conversation offers.
        train_on: every assistant's turn, the conversation's last one, or all of the text but turns that say otherwise.

    Raises:
        RowRefused: the template raises, leaves out what an answer needs, or no turn can be told for sure.
    """
    marked = {index: _is_learned(m) for index, m in enumerate(messages) if m["role"] == "assistant"}
    if not marked:
        raise RowRefused("no answer")
    seen, text = template.in_its_form(messages, tools)
    shape = None if tools else shape_of(messages, looked_for(template.constants())[1])
    known = template.forms.get((shape, train_on))
    spans = known[0].spans(text, messages) if known else None
    if known and spans is not None:
        return replace(known[1], text=text, spans=spans)
    dyes = dyed(template, seen, tools, text)
    result = _told_apart(template, seen, tools, text, dyes, marked, train_on)
    form = Form.of(text, result.spans, messages, dyes) if shape and dyes else None
    if form and len(template.forms) < _REMEMBERED:
        template.forms[shape, train_on] = form, result
    return result


def _told_apart(
    template: ChatTemplate,
    messages: list[Message],
    tools: Tools,
    text: str,
    dyes: Dyed | None,
    marked: dict[int, bool],
    train_on: TrainOn,
) -> Learned:
    """What is learned of a conversation by where its messages stand.

    Args:
        template: of the model.
        messages: as the template reads them.
        tools: functions that the conversation offers.
        text: what the template writes.
        dyes: where they stand in it; None where that is not known.
        marked: by the assistant's turns, whether they are to be learned.
        train_on: as `learned` has it.

    Raises:
        RowRefused: as `learned`.
    """
    wanted = list(marked)
    chosen = [index for index in (wanted[-1:] if train_on == "last" else wanted) if marked[index]]
    if dyes is None:
        if template.marks_answers(tools) and chosen == wanted:
            text, spans = template.generated(messages, tools)
            return Learned(text, _joined(spans), len(wanted))
        raise RowRefused(_UNMASKED, "what it writes of each message depends on the message's words")
    _check_written(dyes, template, messages, tools)
    spans_of = (
        _generated(template, messages, tools, text, dyes)
        if template.marks_answers(tools)
        else _found(template, messages, tools, dyes)
    )
    empty = {index for index in wanted if not dyes.has_words(index)}
    unlearned = {
        "no answer": len(empty),
        "weight 0 or train: false": sum(not marked[index] and index not in empty for index in wanted),
        "the template leaves it out": sum(
            marked[index] and index not in spans_of and index not in empty for index in wanted
        ),
        "data.train_on=last": sum(
            marked[index] and index not in chosen for index in wanted if index in spans_of
        ),
    }
    left_out = {
        "reasoning": sum(dyes.loses(index, reasoning=True) for index in wanted),
        "text next to tool calls": sum(dyes.loses(index) and dyes.shows_calls(index) for index in wanted),
    }
    for index, message in enumerate(messages):
        if message["role"] not in ("assistant", *_RESULTS) and dyes.loses(index):
            left_out[f"{message['role']} messages"] = left_out.get(f"{message['role']} messages", 0) + 1
    turns = [index for index in chosen if index in spans_of]
    if len(empty) == len(wanted):
        raise RowRefused("no answer")
    if not turns:
        raise RowRefused("no turn is learned", next((why for why, count in unlearned.items() if count), ""))
    spans = [span for index in turns for span in spans_of[index]]
    if train_on == "all":
        spans = _without(len(text), [s for i in wanted if not marked[i] for s in spans_of.get(i, [])])
    return Learned(
        text,
        _joined(spans),
        len(turns),
        {why: count for why, count in unlearned.items() if count},
        {what: count for what, count in left_out.items() if count},
    )


def _is_learned(message: Message) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise RowRefused("a weight other than 0 and 1", str(weight))
    if train is not None and not isinstance(train, bool):
        raise RowRefused("a message's train is not true or false", str(train))
    return weight != 0 and train is not False


def _check_written(dyes: Dyed, template: ChatTemplate, messages: list[Message], tools: Tools) -> None:
    """Refuse a conversation of which the template leaves out what its answers go by."""
    if tools and not template.writes_tools:
        names = [str(tool.get("function", tool).get("name")) for tool in tools if isinstance(tool, dict)]
        if not all(name in dyes.text for name in names):
            raise RowRefused("the template writes no tools", ", ".join(names)[:60])
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            if dyes.calls_of(index) and not dyes.shows_calls(index):
                raise RowRefused("the template writes no tool calls", f"message {index + 1}")
        elif message["role"] in _RESULTS and dyes.loses(index):
            raise RowRefused("the template writes no tool results", f"message {index + 1}")


def _generated(
    template: ChatTemplate, messages: list[Message], tools: Tools, text: str, dyes: Dyed
) -> dict[int, list[Span]]:
    """Spans inside `{% generation %}` by message."""
    again, spans = template.generated(messages, tools)
    if again != text:
        raise RowRefused(_UNMASKED, "it writes something else each time")
    result: dict[int, list[Span]] = {}
    last = -1
    for start, end in spans:
        inside = {run.message for run in dyes.runs if run.start < end and start < run.end and not run.is_name}
        if not inside:
            inside = {run.message for run in dyes.runs if run.start < end and start < run.end}
        if not inside and last >= 0:
            inside = {last}
        if not inside:
            continue
        if len(inside) > 1 or messages[min(inside)]["role"] != "assistant":
            raise RowRefused(_UNMASKED, "{% generation %} spans more than an assistant's turn")
        last = inside.pop()
        result.setdefault(last, []).append((start, end))
    return result


def _found(
    template: ChatTemplate, messages: list[Message], tools: Tools, dyes: Dyed
) -> dict[int, list[Span]]:
    """Spans of the assistant's turns that are in the rendering, by message."""
    result: dict[int, list[Span]] = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        own = [run for run in dyes.runs if run.message == index]
        if not own:
            continue
        strong = [run for run in own if not run.is_name] or own[:1]
        first = min(strong[0].start, own[0].start)
        last = strong[-1].end
        if any(run.message != index and first <= run.start < last for run in dyes.runs):
            raise RowRefused(_UNMASKED, f"message {index + 1} stands in more than one place")
        before = max((run.end for run in dyes.runs if run.end <= first), default=0)
        after = next(
            (run.start for run in dyes.runs if run.start >= last and run.message != index), len(dyes.text)
        )
        start = _start(template, messages, tools, dyes, index, before, first)
        rest = dyes.text[last:after]
        kept = len(_own_ending(dyes.messages[index], dyes.text[last - 1], rest))
        result[index] = [(start, last + kept + _end(template, rest[kept:], only_name=strong[0].is_name))]
    return result


def _start(
    template: ChatTemplate,
    messages: list[Message],
    tools: Tools,
    dyes: Dyed,
    index: int,
    before: int,
    first: int,
) -> int:
    """Where the model takes over: behind what the template writes to prompt for the answer.

    Args:
        before: end of the letters before the answer's, in the rendering.
        first: the answer's first letter.
    """
    text = dyes.text
    key = (_shape(dyes, index), repr(tools)) if index else None
    tail = template.tails.get(key) if key else None
    if tail is not None and text.startswith(tail, before):
        return _behind_header(template, text, before + len(tail), first)
    try:
        prompt = template.text(dyes.messages[:index], tools, prompt=True) if index else ""
    except RowRefused:
        prompt = ""
    if not prompt:
        return _behind_opening(template, text, before, first, index)
    runs = dyes.runs_of(prompt)
    behind = runs[-1].end if runs else 0
    tail, glue = prompt[behind:], text[before:first]
    if text.startswith(prompt):
        start = len(prompt)
    elif runs and (before == 0 or prompt[behind - 1] != text[before - 1]):
        # What the template wrote before may differ by what follows it; what is next to the answer may not.
        return before + _behind_marker(template, tail, glue, index)
    else:
        shared = _shared(tail, glue)
        if shared != tail:
            shared = _whole(template, shared)
            if not shared.strip() or template.opener not in shared:
                raise RowRefused(_UNMASKED, f"message {index + 1} does not begin as it is prompted for")
            return _behind_header(template, text, before + len(shared), first)
        start = before + len(tail)
    if key and start == before + len(tail) and len(template.tails) < _REMEMBERED:
        template.tails[key] = tail
    return _behind_header(template, text, start, first)


def _behind_header(template: ChatTemplate, text: str, start: int, first: int) -> int:
    header = template.header
    return start + len(header) if header and text[start:first].startswith(header) else start


def _shape(dyes: Dyed, index: int) -> Hashable:
    """All that a template can go by in the messages before an answer, their letters being replaced."""
    messages = tuple(
        tuple((name, _outline(name, message[name])) for name in sorted(message))
        for message in dyes.messages[:index]
    )
    return messages, dyes.constants


def _outline(name: str, value: Any) -> Hashable:
    """A message's value; of its text the beginning and the end."""
    if isinstance(value, str) and name in ("content", *REASONING):
        return value[:1], value[-1 - len(value) + len(value.rstrip()) :]
    return repr(value)


def _behind_marker(template: ChatTemplate, tail: str, glue: str, index: int) -> int:
    """Where an answer begins in `glue` that follows other letters than it does when it is prompted for.

    What follows these letters then, from a special token on, has to stand in the glue.
    """
    for token in template.special.finditer(tail):
        place = glue.rfind(tail[token.start() :])
        if place >= 0:
            return place + len(tail) - token.start()
    raise RowRefused(_UNMASKED, f"message {index + 1} follows something else when it is prompted for")


def _behind_opening(template: ChatTemplate, text: str, before: int, first: int, index: int) -> int:
    """Where an answer begins that nothing comes before."""
    opening = template.opening or template.header
    place = text.rfind(opening, before, first)
    if opening and place >= 0:
        return place + len(opening)
    specials = list(template.special.finditer(text, before, first))
    if not opening and (specials or not text[before:first].strip()):
        return specials[-1].end() if specials else before
    raise RowRefused(_UNMASKED, f"it is not known where message {index + 1} begins")


def _shared(one: str, other: str) -> str:
    """The beginning that two texts have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _whole(template: ChatTemplate, text: str) -> str:
    """Without a tag or word that is cut at its end."""
    for length in range(len(text), 0, -1):
        if text[length - 1].isspace() or text[length - 1] in ">]:|":
            return text[:length]
    return ""


def _own_ending(message: Message, letter: str, rest: str) -> str:
    """White space and the like by which a message's own text ends, as far as the template wrote it."""
    content = message.get("content")
    if not isinstance(content, str) or letter not in content:
        return ""
    ending = content[content.rindex(letter) + 1 :]
    return next((text for text in (ending, ending.rstrip()) if rest.startswith(text)), "")


def _end(template: ChatTemplate, rest: str, only_name: bool) -> int:
    """How many characters of what follows an answer's own text belong to it.

    Args:
        rest: up to the next message's first letter.
        only_name: only a called function's name is known, so that more of the call follows.
    """
    specials = list(template.special.finditer(rest))
    openers = {template.opener} if only_name and template.opener else template.openers
    opener = next((token.start() for token in specials if token.group() in openers), len(rest))
    specials = [token for token in specials if token.start() < opener]
    closing = template.special.search(template.end)
    if closing:
        ends = [token.end() for token in specials if token.group() == closing.group()]
        if ends:
            return ends[0]
    elif template.end:
        place = rest.find(template.end)
        return place + len(template.end) if 0 <= place < opener else 0
    if not specials:
        return 0
    return specials[-1 if only_name else 0].end()


def _joined(spans: list[Span]) -> list[Span]:
    """In order, those that touch or overlap as one."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        elif start < end:
            result.append((start, end))
    return result


def _without(length: int, spans: list[Span]) -> list[Span]:
    """All of `length` characters but those of `spans`."""
    result, place = [], 0
    for start, end in _joined(spans):
        result.append((place, start))
        place = end
    return [*result, (place, length)]
