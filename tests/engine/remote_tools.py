"""Another machine for tests: a program called ``ssh`` that runs the command here, in a folder of its own; and
a real sshd of this user's on a port of its own."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from waiting import wait_until

REPOSITORY = Path(__file__).parents[2]

EQAT_THERE = f"{shlex.quote(sys.executable)} -m eqat_tui"

# ssh [OPTION...] -- HOST COMMAND. Each connection takes a number from the file ``cuts``: after so many bytes
# it is cut, as a network would cut it; -1 means that the host cannot be reached. Without one it goes well.
STAND_IN = """\
import os, subprocess, sys
from pathlib import Path

place = Path({place!r})
with open(place / "asked", "a") as asked:
    print(sys.argv[1:], file=asked)
host, command = sys.argv[sys.argv.index("--") + 1 :]
cuts = (place / "cuts").read_text().split() if (place / "cuts").exists() else []
if (place / "down").exists() or (cuts and int(cuts[0]) < 0):
    (place / "cuts").write_text(" ".join(cuts[1:]))
    sys.exit(print(f"ssh: connect to host {{host}} port 22: No route to host", file=sys.stderr) or 255)
os.chdir(place / "there")
if not cuts or "tail-events" not in command:
    os.execvp("sh", ["sh", "-c", command])
(place / "cuts").write_text(" ".join(cuts[1:]))
left = int(cuts[0])
child = subprocess.Popen(["sh", "-c", "exec " + command], stdout=subprocess.PIPE)
while left > 0 and (piece := os.read(child.stdout.fileno(), left)):
    os.write(1, piece)
    left -= len(piece)
child.kill()
sys.exit(255 if left == 0 else child.wait())
"""


class Elsewhere:
    """The stand-in's machine: what it runs, it runs in :attr:`there`."""

    def __init__(self, place: Path) -> None:
        self.place, self.there = place, place / "there"
        self.there.mkdir(parents=True)
        program = place / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable} -SE\n{STAND_IN.format(place=str(place))}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def variables(self) -> dict[str, str]:
        """Of an environment in which ``ssh`` goes there."""
        path = f"{self.place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "PYTHONPATH": str(REPOSITORY)}

    def cut(self, *counts: int) -> None:
        """The next connections break off after so many bytes each."""
        (self.place / "cuts").write_text(" ".join(map(str, counts)))

    def cuts_left(self) -> int:
        """Connections that are still to break off."""
        return len((self.place / "cuts").read_text().split())

    def down(self, yes: bool) -> None:
        """Nobody can connect, or everybody again."""
        mark = self.place / "down"
        if yes:
            mark.touch()
        else:
            mark.unlink()

    def asked(self) -> list[str]:
        """The arguments of each call of ssh, as text."""
        asked = self.place / "asked"
        return asked.read_text().splitlines() if asked.exists() else []


class Sshd(NamedTuple):
    """A real one."""

    options: str
    """What ssh has to be told to get there."""
    host: str
    server: subprocess.Popen[bytes]


@contextmanager
def sshd(place: Path) -> Iterator[Sshd | str]:
    """An sshd on the loopback, with keys that are thrown away; why not, where none can be started."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    keygen = shutil.which("ssh-keygen")
    if program is None or keygen is None or shutil.which("ssh") is None:
        yield "there is none"
        return
    place.mkdir(mode=0o700)
    for name in ("host", "mine"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    (place / "keys").write_text((place / "mine.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "known").write_text(f"[127.0.0.1]:{port} {(place / 'host.pub').read_text()}")
    (place / "conf").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {place / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {place / 'keys'}\nStrictModes no\nPermitRootLogin yes\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"SetEnv PYTHONPATH={REPOSITORY} EQAT_CONFIG_DIR=/nonexistent/eqat EQAT_STATE_DIR=/nonexistent/eqat\n"
    )
    server = subprocess.Popen(
        [program, "-D", "-e", "-f", str(place / "conf")], stderr=(place / "said").open("wb")
    )
    try:
        wait_until(lambda: _answers(port) or server.poll() is not None)
        options = f"-F none -p {port} -i {place / 'mine'} -o UserKnownHostsFile={place / 'known'}"
        host = f"{getpass.getuser()}@127.0.0.1"
        yield Sshd(options, host, server) if server.poll() is None else (place / "said").read_text().strip()
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
