"""Conversations as text in which the answers are known: what a model must learn to produce, and nothing else.

An answer is what the model writes when it is its turn: the text, and the marker that ends the turn. The
header that says whose turn it is stands in the prompt, and system and user turns are only read::

    <|im_start|>user\\nHow are you?<|im_end|>\\n<|im_start|>assistant\\nFine.<|im_end|>\\n
                                                                    ^^^^^^^^^^^^^^^^

A chat template that says so itself (``{% generation %}``) is believed. For any other the same program tells
it that will write the prompts later: what it writes of all that precedes an answer, ready for one, ends
where the answer begins. It ends with the conversation cut behind it, or, in templates that write the last
turn otherwise than earlier ones, with its text; the marker behind it belongs to it, line ends behind that
do not.

Two templates are our own: the prompt that Alpaca was published with, and ChatML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.instructions import Template
from engine.data.conversations import Conversation, Turn
from engine.errors import PreflightError
from engine.evaluation.chat import LONGEST, Refused, checked, in_a_child

TOGETHER = 64
"""Conversations that one child renders, which may take as long for them as for one prompt."""
END = "<|im_end|>"
_START = "<|im_start|>"
_DATE = "26 Jul 2024"
"""Told to templates that write the date of the day (it is what Llama's fall back to): the same conversation
must give the same text tomorrow."""
_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the "
    "request.\n\n"
)
_WITH_INPUT = ", paired with an input that provides further context"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where its answers are."""

    text: str
    answers: tuple[Span, ...]
    """Characters, first and one behind the last."""


Render = Callable[[Sequence[Conversation]], list[Rendered | str]]
"""Conversations as text; in the place of one that cannot be written, why."""


def renderer(template: Template, tokenizer: Any) -> Render:
    """What writes conversations by a template.

    Raises:
        PreflightError: for a tokenizer that lacks what the template needs.
    """
    if template == "alpaca":
        return _each(_alpaca, _end_of_text(tokenizer))
    if template == "chatml":
        _need_chatml(tokenizer)
        return _each(_chatml, END)
    if not getattr(tokenizer, "chat_template", None):
        raise PreflightError(
            "the model has no chat template",
            where="instructions.template",
            hint="instructions.template=alpaca, or chatml where the tokenizer has its tokens",
        )
    return lambda conversations: _by_the_model(tokenizer, conversations)


def rules(template: Template, tokenizer: Any) -> str:
    """Equal where the same conversation gives the same text."""
    return str(tokenizer.get_chat_template()) if template == "model" else f"{template} 1"


# -- our own -------------------------------------------------------------------------------------------


class _Pieces:
    """A text that grows."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[Span] = []

    def read(self, text: str) -> None:
        """What the model only reads."""
        self.text += text

    def answer(self, text: str, *, learned: bool) -> None:
        """What it writes."""
        begin = len(self.text)
        self.text += text
        if learned:
            self.answers.append((begin, len(self.text)))


def _each(write: Callable[[Conversation, str], _Pieces], end: str) -> Render:
    def render(conversations: Sequence[Conversation]) -> list[Rendered | str]:
        pieces = (write(conversation, end) for conversation in conversations)
        return [Rendered(one.text, tuple(one.answers)) for one in pieces]

    return render


def _alpaca(conversation: Conversation, end: str) -> _Pieces:
    """A system turn takes the preamble's place; later turns go on below, as the first does."""
    pieces = _Pieces()
    preamble = True
    for turn in conversation:
        if turn.role == "assistant":
            pieces.answer(turn.text + end, learned=turn.learned)
            pieces.read("\n\n")
            continue
        if turn.role == "system":
            pieces.read(f"{turn.text}\n\n")
        else:
            if preamble:
                pieces.read(_PREAMBLE.format(_WITH_INPUT if turn.given else ""))
            given = f"### Input:\n{turn.given}\n\n" if turn.given else ""
            pieces.read(f"### Instruction:\n{turn.text}\n\n{given}### Response:")
        preamble = False
    pieces.text = pieces.text.removesuffix("\n\n")
    return pieces


def _chatml(conversation: Conversation, end: str) -> _Pieces:
    pieces = _Pieces()
    for turn in conversation:
        pieces.read(f"{_START}{turn.role}\n")
        if turn.role == "assistant":
            pieces.answer(turn.text + end, learned=turn.learned)
        else:
            pieces.read(turn.content + end)
        pieces.read("\n")
    return pieces


def _end_of_text(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise PreflightError(
            "the tokenizer has no end-of-text token, by which an answer could end",
            where="instructions.template",
            hint="choose another template",
        )
    return str(tokenizer.eos_token)


def _need_chatml(tokenizer: Any) -> None:
    for marker in (_START, END):
        if len(tokenizer(marker, add_special_tokens=False)["input_ids"]) != 1:
            raise PreflightError(
                f"the tokenizer has no token {marker}",
                where="instructions.template",
                hint="instructions.template=alpaca needs none, or model where it has a chat template",
            )


# -- the model's ---------------------------------------------------------------------------------------


def _by_the_model(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Rendered | str]:
    """By the tokenizer's chat template, which is somebody else's program."""
    markers = special_texts(tokenizer)
    characters = sum(len(turn.content) for conversation in conversations for turn in conversation)
    longest = LONGEST + 64 * characters

    def work() -> list[Any]:
        return [_written(tokenizer, conversation, markers, longest) for conversation in conversations]

    found = in_a_child(work, longest)
    return [
        one if isinstance(one, str) else Rendered(one[0], tuple((begin, end) for begin, end in one[1]))
        for one in found
    ]


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The markers of the tokenizer: tokens that no text of a person has."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token.content) for token in added if token.special}
    return tuple(sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True))


def _written(tokenizer: Any, conversation: Conversation, markers: Sequence[str], longest: int) -> Any:
    """Text and spans of one conversation; a text alone says why there are none."""
    try:
        spans = _marked if _GENERATION.search(tokenizer.get_chat_template()) else _found
        text, answers = spans(tokenizer, conversation, markers)
        learned = [turn.learned for turn in conversation if turn.role == "assistant"]
        if len(answers) != len(learned):
            raise Refused(f"it writes {len(answers)} of {len(learned)} answers")
        kept = [span for span, wanted in zip(answers, learned, strict=True) if wanted]
        return [checked(text, longest), kept]
    except MemoryError:
        raise
    except Exception as error:
        return f"{error}".strip().partition("\n")[0][:200] or type(error).__name__


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _render(tokenizer: Any, turns: Sequence[Turn], *, ready: bool = False) -> str:
    """What the template writes of some turns; ``ready`` for an answer."""
    text = tokenizer.apply_chat_template(
        _messages(turns), tokenize=False, add_generation_prompt=ready, date_string=_DATE
    )
    return checked(text, len(text) if isinstance(text, str) else 0)


def _marked(tokenizer: Any, turns: Conversation, markers: Sequence[str]) -> tuple[str, list[Span]]:
    """Where the template itself says that the answers are."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        conversations=[_messages(turns)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, "date_string": _DATE},
    )
    return text, [(int(begin), int(end)) for begin, end in spans]


def _found(tokenizer: Any, turns: Conversation, markers: Sequence[str]) -> tuple[str, list[Span]]:
    """Where the template's own prompts end, and the answers behind them."""
    whole = _render(tokenizer, turns)
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _render(tokenizer, turns[:index], ready=True)
        if not whole.startswith(before):
            raise Refused("what it writes before an answer is another text once the answer is there")
        after = whole if index == len(turns) - 1 else _render(tokenizer, turns[: index + 1])
        spans.append((len(before), _end(whole, len(before), after, turn.text.strip(), markers)))
    return whole, spans


def _end(whole: str, begin: int, after: str, said: str, markers: Sequence[str]) -> int:
    """One behind the last character of the answer that begins at ``begin``; ``after`` is the conversation cut
    behind it."""
    place = whole.find(said, begin)
    if place < 0:
        raise Refused("it does not write an answer as it is")
    behind = place + len(said)
    if len(after) >= behind and whole.startswith(after):
        end = len(after)
        # The last marker ends the turn; line ends that follow it nobody waits for.
        ends = [behind + found.end() for found in _markers(markers).finditer(whole[behind:end])]
        return ends[-1] if ends and not whole[ends[-1] : end].strip() else end
    marker = re.compile(r"\s*" + _markers(markers).pattern).match(whole, behind)
    return marker.end() if marker else behind


def _markers(markers: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(?:" + "|".join(map(re.escape, markers)) + ")" if markers else "(?!)")
