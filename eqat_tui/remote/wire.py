"""What ``eqat tail-events`` prints and ``eqat attach HOST:RUN`` reads: one JSON object a line, told apart by
``kind``.

``hello`` comes first. Then the files that a run is shown with, every event of its log (as it was written)
with the byte behind it, and ``look``: what only the machine of the run can tell, whenever that has changed
and at least every few seconds, so that silence means that nobody is there. Both sides pass over kinds and
fields that they do not know; what a reader of today could misunderstand raises :data:`CONTRACT`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from engine.run import control
from engine.run.liveness import State, Work
from engine.run.status import Status
from engine.system.guarded import BadFile
from engine.system.log_bytes import head

CONTRACT = 1
BEAT_S = 5.0
"""Seconds after which ``look`` is said again although nothing has changed."""
SILENT_S = 4 * BEAT_S
"""Seconds of silence after which a connection counts as lost, whatever the network says."""
TOP_FILES = ("config.toml", "run.json", "origin.json", "launch.json")
"""Files at the top of a run that it is shown with, beside its log; and in ``eval/`` what was measured
later."""
LARGEST_FILE = 4 << 20
LOG_BYTES = 1 << 14
"""Of what an engine printed, so much of the end is passed on."""
FIRST_LINE = 1 << 16


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """A line."""


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Who speaks of which run: its id and its folder there. ``log`` is what its log is known by, and
    ``start`` the byte from which on it is told: 0 where it is another log than the reader had."""

    contract: int = CONTRACT
    eqat: str
    id: str
    path: str
    log: str
    start: int


class File(Message, frozen=True, kw_only=True, tag="file"):
    """A text file of the run, by its path in it, as it is now; of an engine's output the end."""

    name: str
    text: str


class Told(Message, frozen=True, kw_only=True, tag="event"):
    """A line of the log, and the byte behind its newline: from there on one goes on."""

    end: int
    event: msgspec.Raw


class Again(Message, frozen=True, kw_only=True, tag="again"):
    """The log is another one than before, or the first one; it is told from its beginning."""

    log: str


class Seen(Message, frozen=True, kw_only=True, tag="look"):
    """What only the machine of the run can tell. ``now`` is its clock."""

    now: float
    there: bool = True
    state: State = "created"
    work: Work | None = None
    status: Status | None = None
    pid: int | None = None
    requests: tuple[control.Request, ...] = ()
    why_gone: str = ""


AnyMessage = Hello | File | Told | Again | Seen
_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)
_encoder = msgspec.json.Encoder()


class _Head(msgspec.Struct):
    kind: str = ""
    contract: int = 0
    eqat: str = ""


_head_decoder = msgspec.json.Decoder(_Head)


def encode(message: AnyMessage) -> bytes:
    """``message`` as a line; what is no text (a name that is not UTF-8) is escaped."""
    try:
        return _encoder.encode(message) + b"\n"
    except UnicodeEncodeError:
        return _encoder.encode(_text(msgspec.to_builtins(message))) + b"\n"


def _text(tree: Any) -> Any:
    if isinstance(tree, str):
        return tree.encode("utf-8", "backslashreplace").decode()
    if isinstance(tree, dict):
        return {_text(key): _text(value) for key, value in tree.items()}
    return [_text(value) for value in tree] if isinstance(tree, list) else tree


def decode(line: bytes) -> AnyMessage | None:
    """The message in ``line``; none for what a shell prints at its start, half a line, or a kind of the
    future."""
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def newer(line: bytes) -> str:
    """Which version of eqat speaks, where it says ``hello`` by a newer contract than is known here."""
    try:
        found = _head_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return found.eqat or "?" if found.kind == "hello" and found.contract > CONTRACT else ""


def log_mark(log: Path) -> str:
    """What a log is known by: a digest of its first line, which says when and by what process it was begun.
    Empty before there is one."""
    try:
        first, newline, _ = head(log, FIRST_LINE).partition(b"\n")
    except (OSError, BadFile):
        return ""
    return hashlib.sha256(first).hexdigest()[:16] if newline else ""
