"""The user's own ssh: what is typed for a command over there, and what its failures mean.

Nothing listens anywhere and no port is opened. ``$EQAT_SSH`` is another program than ``ssh`` or has options
before the host (``ssh -J bastion``); ``--ssh-option`` adds some, ``--remote-command`` says what eqat is
called there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import EqatError, ExitCode, PreflightError, UsageError
from eqat_tui.output import one_line

SSH_VARIABLE = "EQAT_SSH"
FAILED = 255
"""What ssh itself ends with where it cannot connect, or loses the connection."""
NOT_FOUND = (126, 127)
"""What a shell ends with where there is no such program, or none that can be run."""
LONGEST_REQUEST_S = 60.0
_QUIET = ("-T", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_BATCH = ("-o", "BatchMode=yes")
_REMOTE = re.compile(r"((?:[^/:\[\]]+@)?\[[^\]/]+\]|[^/:\[\]]+):(.*)", re.DOTALL)
_NOISE = re.compile(r"^(?:Warning: Permanently added|Connection to .* closed|\*\* |Killed by signal)")


class Destination(NamedTuple):
    """Where a run is, and how one gets there."""

    host: str
    options: tuple[str, ...] = ()
    command: str = "eqat"
    """What eqat is called there, as it is typed into a shell."""

    def types(self, *arguments: str) -> str:
        """What a person would type for a command of eqat over there."""
        return shlex.join([*_program(), *self.options, self.host, f"{self.command} {shlex.join(arguments)}"])

    def start(self, *arguments: str, may_ask: bool) -> list[str]:
        """The command line that runs eqat over there; ``may_ask`` for a password, where there is a
        terminal."""
        ask = () if may_ask else _BATCH
        remote = f"{self.command} {shlex.join(arguments)}"
        return [*_program(), *self.options, *_QUIET, *ask, "--", self.host, remote]

    def run(self, *arguments: str) -> str:
        """Run eqat over there to its end; what it said last.

        Raises:
            EqatError: for whatever went wrong, there or on the way.
        """
        try:
            done = subprocess.run(
                self.start(*arguments, may_ask=False),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=LONGEST_REQUEST_S,
            )
        except subprocess.TimeoutExpired as error:
            message = f"did not answer in {LONGEST_REQUEST_S:.0f} s"
            raise PreflightError(message, where=self.host, hint=f"try: {self.types(*arguments)}") from error
        except OSError as error:
            raise no_ssh(error) from error
        if done.returncode:
            raise self.failure(done.returncode, done.stderr)
        return last_words(done.stderr)

    def failure(self, code: int, said: bytes) -> EqatError:
        """What the end of a command with ``code`` means, which ``said`` this on stderr."""
        words = last_words(said)
        if code in NOT_FOUND or (code == 1 and "No module named" in words):
            return PreflightError(
                f"there is no {self.command!r} on the PATH that ssh finds there",
                where=self.host,
                hint="--remote-command '/path/to/.venv/bin/eqat' says where it is",
            )
        if code == FAILED or code < 0:
            return PreflightError(
                f"cannot be reached: {words or 'ssh ended without a word'}",
                where=self.host,
                hint=f"try: {shlex.join([*_program(), *self.options, self.host, 'true'])}",
            )
        if code == 0:
            return PreflightError(
                "what answers there does not speak as eqat tail-events does",
                where=self.host,
                hint=f"try: {self.types('--version')}",
            )
        if "No such command" in words or "No such option" in words:
            return PreflightError(
                f"its eqat is too old for this one ({words})",
                where=self.host,
                hint="install the same version there",
            )
        known = code in ExitCode.__members__.values()
        exit_code = ExitCode(code) if known else ExitCode.BUG
        return EqatError(
            words or f"eqat ended there with exit code {code}", where=self.host, exit_code=exit_code
        )


def _program() -> list[str]:
    return _words(os.environ.get(SSH_VARIABLE) or "ssh", f"${SSH_VARIABLE}")


def _words(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"cannot be read: {error}", where=where, hint="quote it as in a shell") from error


def split(ref: str) -> tuple[str, str] | None:
    """``HOST:RUN`` as its two halves, as scp reads it; none for a run of this machine."""
    found = _REMOTE.fullmatch(ref)
    if found is None or os.path.exists(os.path.expanduser(ref)):
        return None
    host, run = found[1], found[2] or "latest"
    bare = host.rpartition("@")[2]
    if host.startswith("-") or not bare.strip("[]"):
        raise UsageError("is no host", where=ref, hint="eqat attach user@host:RUN")
    return host.replace("[", "").replace("]", ""), run


def options_of(given: Sequence[str]) -> tuple[str, ...]:
    """``--ssh-option '-p 2222'``, each of one or several words."""
    return tuple(word for text in given for word in _words(text, "--ssh-option"))


def no_ssh(error: OSError) -> PreflightError:
    """There is no such program here."""
    hint = f"install OpenSSH's client, or name yours in ${SSH_VARIABLE}"
    return PreflightError(f"cannot be started: {error.strerror}", where=_program()[0], hint=hint)


def last_words(said: bytes) -> str:
    """The last line that tells something, without the ``error:`` that eqat begins it with."""
    lines = [one_line(line) for line in said[-(1 << 14) :].decode(errors="replace").splitlines()]
    told = [line for line in lines if line and not _NOISE.match(line)]
    errors = [line for line in told if line.startswith("error: ")]
    return ((errors or told or [""])[-1]).removeprefix("error: ")
