"""A real Slurm on this machine: slurmctld, and a slurmd for each of two nodes that share it.

Everything lies in one folder and is gone with it. No munge, no database, no root: whoever runs the tests is
Slurm's user, and authentication is off, which is why the daemons hear on this machine's loopback alone.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
NODES = ("n1", "n2")
Eqat = Callable[..., "subprocess.CompletedProcess[str]"]

CONF = """
ClusterName=eqat
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoAddrCache
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=2
MinJobAge=300
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=4096
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=4096
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def is_installed() -> bool:
    """Whether Slurm's daemons and commands are here."""
    return all(shutil.which(name, path=PATH) for name in PROGRAMS)


class Cluster:
    """The daemons; :meth:`start` and :meth:`stop` them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._ctld: subprocess.Popen[bytes] | None = None
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def start(self) -> None:
        """Start slurmctld; its nodes are down until they are started."""
        ports = free_ports(3)
        values = dict(zip(("ctld", *NODES), ports, strict=True))
        host = socket.gethostname()
        text = CONF.format(folder=self.folder, host=host, user=getpass.getuser(), **values)
        self.conf.write_text(text)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self._ctld = self._daemon("slurmctld", "-D", "-i")
        self.wait(lambda: set(self.node_states()) == set(NODES), "slurmctld does not answer")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, and wait until it takes jobs."""
        self._slurmds[node] = self._daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.node_states()[node] in ("idle", "mix", "alloc"), f"{node} takes no jobs")

    def fail_node(self, node: str) -> None:
        """As when its power fails: slurmd, the jobs' keepers and what they keep are killed at once."""
        import psutil

        slurmd = self._slurmds.pop(node)
        keepers = [
            one
            for one in psutil.process_iter(["name", "cmdline"])
            if one.info["name"] == "slurmstepd" and self._keeps(one.pid, node)
        ]
        slurmd.kill()
        slurmd.wait()
        for keeper in keepers:
            below = keeper.children(recursive=True)
            for process in (keeper, *below):
                process.kill()

    def _keeps(self, pid: int, node: str) -> bool:
        """Whether a slurmstepd is one of ``node`` of this cluster: its log is that node's."""
        import psutil

        try:
            files = [file.path for file in psutil.Process(pid).open_files()]
        except psutil.Error:
            return False
        return any(path.startswith(f"{self.folder}/slurmd-{node}.log") for path in files)

    def stop(self) -> None:
        """End the daemons, and what is left of jobs."""
        if self._ctld is not None and self._ctld.poll() is None:
            self.command("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
            self.command("scancel", "--user", getpass.getuser(), check=False)
            time.sleep(0.5)
        for process in (*self._slurmds.values(), *([self._ctld] if self._ctld else [])):
            process.terminate()
        for process in (*self._slurmds.values(), *([self._ctld] if self._ctld else [])):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def command(self, *words: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """The state of each node, by its name."""
        lines = self.command("sinfo", "-h", "-N", "-o", "%N %t", "-p", "low", check=False).split("\n")
        return dict(line.split() for line in lines if line)

    def job_state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ...; empty for one that Slurm does not know."""
        words = ("squeue", "-h", "--states=all", "--array", "-o", "%i %T")
        found = dict(line.split() for line in self.command(*words).splitlines())
        return found.get(job, "")

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        """Wait for something; what the daemons said is told where it does not come."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        found = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))]
        queue = self.command("squeue", "--states=all", "--array", check=False)
        return "\n".join([queue, *found])

    def _daemon(self, *words: str) -> subprocess.Popen[bytes]:
        program = shutil.which(words[0], path=PATH)
        assert program is not None
        return subprocess.Popen(
            [program, "-f", str(self.conf), *words[1:]],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{'-'.join(words)}.stderr.log").open("wb"),
            start_new_session=True,
        )


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody hears on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
