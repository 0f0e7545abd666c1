"""Rows of the usual data sets of instructions as conversations, told by their columns.

==================  ==================================================================================
messages            ``messages`` (or ``conversations``): a list of ``{"role", "content"}``, as OpenAI has it
ShareGPT            ``conversations`` (or ``messages``): a list of ``{"from", "value"}``
Alpaca              ``instruction``, ``output``, and where there are some ``input``, ``system``, ``history``
prompt, response    ``prompt`` or ``question``, and ``response``, ``completion`` or ``answer``
==================  ==================================================================================

What comes after the last answer teaches nothing and is left out; a row without an answer is no conversation.
How many such rows there were is told, and where most are, the file is refused, with what was found in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.data.columns import EARLY, kind_of, listed
from engine.data.lines import TOO_DEEP, is_text
from engine.errors import DataError

Role = Literal["system", "user", "assistant"]

UNDERSTOOD = (
    "understood are rows with messages or conversations (lists of role and content, or from and value), with "
    "instruction and output, or with prompt and response"
)

_LISTS = ("messages", "conversations", "conversation")
_PROMPTS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")
_INPUTS = ("input", "context")
_KEYS = (("role", "content"), ("from", "value"))
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt"), "assistant"),
}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str
    given: str = ""
    """The input of an instruction, which some templates write apart from it."""
    learned: bool = True
    """Of an answer: whether it is one to learn from."""

    @property
    def content(self) -> str:
        """Everything that is said, in one piece."""
        return f"{self.text}\n\n{self.given}" if self.given.strip() else self.text


Conversation = tuple[Turn, ...]


def question(conversation: Conversation) -> str:
    """All that precedes the first answer: what decides to which part of the text a conversation belongs, so
    that another answer to the same question is in the same one."""
    said = []
    for turn in conversation:
        if turn.role == "assistant":
            break
        said.append(f"{turn.role}:{turn.content}")
    return "\n".join(said)


class Unusable(Exception):
    """A row that is no conversation; the message says why."""


def conversation_of(row: Any) -> Conversation:
    """The conversation that a row holds, up to its last answer.

    Raises:
        Unusable: where there is none.
    """
    if row is TOO_DEEP:
        raise Unusable("the row is nested too deeply to be read")
    if not isinstance(row, Mapping):
        raise Unusable("the row is not a JSON object")
    turns = _turns(row)
    learned = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned:
        raise Unusable("has no answer")
    turns = turns[: learned[-1] + 1]
    if next(turn for turn in turns if turn.role != "system").role == "assistant":
        raise Unusable("begins with an answer to nothing")
    return tuple(turns)


def _turns(row: Mapping[str, Any]) -> list[Turn]:
    for name in _LISTS:
        if _is_conversation(row.get(name)):
            turns = [_turn(turn, name) for turn in row[name]]
            return [turn for turn in turns if turn.role == "user" or turn.text.strip()]
    prompt = next((name for name in _PROMPTS if name in row), None)
    answer = next((name for name in _ANSWERS if name in row), None)
    if prompt is not None and answer is not None:
        return _pair(row, prompt, answer)
    talk = next((name for name in _LISTS if name in row), None)
    if talk is None:
        raise Unusable(f"has the columns {listed(list(row)) or '(none)'}")
    if not row[talk]:
        raise Unusable("has no answer")
    raise Unusable(f"column {talk!r} holds {kind_of(row[talk])} that is not made of turns")


def _is_conversation(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, Mapping) and any(set(keys) <= set(turn) for keys in _KEYS) for turn in turns
    )


def _turn(turn: Mapping[str, Any], column: str) -> Turn:
    who, what = next(keys for keys in _KEYS if set(keys) <= set(turn))
    said, content = turn[who], turn[what]
    role = _ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise Unusable(f"column {column!r} has a turn of {listed([said])}, which is none of {_known()}")
    if isinstance(content, list):
        content = _joined(content, column)
    # Of the format in which models of others are tuned: an answer of weight 0 is only there to be read.
    return Turn(role, _text(content, f"{column}.{what}"), learned=turn.get("weight") != 0)


def _known() -> str:
    return ", ".join(dict.fromkeys(_ROLES.values()))


def _joined(parts: Sequence[Any], column: str) -> str:
    """Content that is written as a list of parts, all of which have to be text."""
    named = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [text for text in named if isinstance(text, str)]
    if len(texts) < len(parts):
        raise Unusable(f"column {column!r} has a turn with more than text in it")
    return "".join(texts)


def _pair(row: Mapping[str, Any], prompt: str, answer: str) -> list[Turn]:
    """Instruction and answer, and what was said before."""
    turns: list[Turn] = []
    if row.get("system"):
        turns.append(Turn("system", _text(row["system"], "system")))
    for pair in row.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable("column 'history' is not a list of pairs of question and answer")
        turns += [Turn("user", _text(pair[0], "history")), Turn("assistant", _text(pair[1], "history"))]
    given = next((row[name] for name in _INPUTS if row.get(name)), "")
    asked = Turn("user", _text(row[prompt], prompt), _text(given, "input"))
    if not asked.content.strip():
        raise Unusable(f"column {prompt!r} is empty")
    turns.append(asked)
    said = row[answer]
    # Null is an answer that nobody has given.
    if said is None or not _text(said, answer).strip():
        raise Unusable("has no answer")
    return [*turns, Turn("assistant", said)]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"column {column!r} holds {kind_of(value)}, not text")
    if not is_text(value):
        raise Unusable(f"column {column!r} holds half a character (a lone surrogate)")
    return value


class Judged:
    """The rows of one source: which are conversations, and how many are none."""

    def __init__(self, *, uniform: bool = False) -> None:
        """``uniform`` says that all rows have the same columns, so that one without speaks for all."""
        self.read = 0
        self.reasons: dict[str, int] = {}
        """Of rows that are left out."""
        self._uniform = uniform
        self._first = ("", "")

    @property
    def skipped(self) -> int:
        """Rows that are left out."""
        return sum(self.reasons.values())

    def conversation(self, row: Any, where: str) -> Conversation | None:
        """A row's conversation; none where there is none, which is counted.

        Raises:
            DataError: where it is clear that most rows have none.
        """
        self.read += 1
        try:
            return conversation_of(row)
        except Unusable as problem:
            self._first = self._first if self.skipped else (str(problem), where)
            self.reasons[str(problem)] = self.reasons.get(str(problem), 0) + 1
            if self.read >= EARLY or (self._uniform and str(problem).startswith("has the columns")):
                self.refuse_most()
            return None

    def refuse_most(self) -> None:
        """DataError where more than half of the rows so far are no conversations."""
        if self.skipped * 2 <= self.read:
            return
        problem, where = self._first
        if self.skipped < self.read:
            problem = f"{self.skipped:,} of {self.read:,} rows are no conversations; the first: {problem}"
        raise DataError(problem, where=where, hint=UNDERSTOOD)

    def words(self, corpus: str) -> list[str]:
        """What is told of rows that are no conversations: one line, or none.

        Raises:
            DataError: as :meth:`refuse_most`.
        """
        self.refuse_most()
        if not self.skipped:
            return []
        problem, where = self._first
        unanswered = self.reasons.get("has no answer", 0)
        of_these = f" ({unanswered:,} without an answer)" if unanswered else ""
        return [
            f"{corpus}: {self.skipped:,} of {self.read:,} rows are no conversations{of_these} and were left "
            f"out; the first: {problem} ({where})"
        ]
