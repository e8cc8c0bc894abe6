"""A throw-away Slurm on loopback: real slurmctld, two slurmd, munge; no systemd, nothing in /etc, fake GPUs.

Needs the programs of Debian's slurmctld, slurmd, slurm-client and munge. All that it writes lies below one short folder
(unix sockets have 108 bytes for their path).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
# Debian keeps daemons where a user's PATH does not look.
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
NODES = ("127.0.0.11", "127.0.0.12")  # names that resolve by themselves, to this machine
GPUS, CPUS, MEMORY_MB = 8, 64, 500_000  # what each node claims to have
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PATIENCE = 6  # times the seconds a step should take: other tests, or other programs, may have the processors

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
# Another cluster of this machine must not have jobs of the same number: processes are found by it, and ranks meet at a
# port made of it (slurm/job.sh).
FirstJobId={port}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential is over: here 5 s, not 2 minutes.
AuthInfo=socket={base}/munge.sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
# Believe the sizes below rather than those of the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
KillWait=5
MinJobAge=3600
SlurmctldTimeout=10
SlurmdTimeout=6
TreeWidth=65533
NodeName=127.0.0.1[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} \
RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=60 State=UP
"""


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the system gives to clients, above the ranks'."""
    chance = random.Random()
    while True:
        first = chance.randrange(20_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    """What ``condition()`` gives once it is true: ``seconds`` on a machine that does nothing else."""
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return value


def processes_with(entry: str) -> list[int]:
    """Processes of this machine that have ``NAME=value`` in the environment they were started with."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def parent(pid: int) -> int:
    return int(re.findall(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), flags=re.M)[0])


class Cluster:
    """``with Cluster() as cluster: cluster.submit(...)``"""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self.conf = self.base / "slurm.conf"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {**inherited, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Cluster:
        self.base.chmod(0o755)  # munge looks at it
        for folder in ("state", "gpu", *(f"spool/{node}" for node in NODES)):
            (self.base / folder).mkdir(parents=True)
        for number in range(GPUS):
            (self.base / "gpu" / f"gpu{number}").symlink_to("/dev/null")
        port = free_ports(1 + len(NODES))
        sizes = {"cpus": CPUS, "memory": MEMORY_MB, "gpus": GPUS}
        ports = {"port": port, "first": port + 1, "last": port + len(NODES)}
        self.conf.write_text(CONF.format(base=self.base, user=getpass.getuser(), **ports, **sizes))
        gres = f"NodeName=127.0.0.1[1-2] Name=gpu File={self.base}/gpu/gpu[0-{GPUS - 1}]\n"
        (self.base / "gres.conf").write_text(gres)
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        try:
            self._start_munge()
            self.call("slurmctld", "-f", str(self.conf))
            for node in NODES:
                self.start_node(node)
            wait_for(lambda: self.idle_nodes() == len(NODES), 30, "a Slurm cluster of two nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_munge(self) -> None:
        key = self.base / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self.base / str(path)}" for name, path in (files | {"seed-file": "munge.seed"}).items()]
        self.call("munged", *options, "--num-threads=2")

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str, job: Job) -> None:
        """What is seen of a node that lost its power: its daemon and all processes of a job there are gone."""
        there = set(job.processes()) & set(processes_with(f"SLURMD_NODENAME={node}"))
        keepers = {parent(pid) for pid in there}
        keepers = {pid for pid in keepers if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")}
        assert there
        assert keepers
        for pid in (self.daemon(f"slurmd.{node}"), *keepers, *there):
            os.kill(pid, signal.SIGKILL)

    def daemon(self, name: str) -> int:
        """The process of slurmctld, munged, or slurmd.NODE; 0 if there is none."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.base / f"{name}.pid").read_text())
            os.kill(pid, 0)
            return pid
        return 0

    def idle_nodes(self) -> int:
        return self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split().count("idle")

    def stop(self) -> None:
        """End every job and daemon, by the ids that they wrote, and remove the folder."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.call("scancel", "--full", f"--user={getpass.getuser()}", check=False, timeout=10)
            wait_for(lambda: not self.call("squeue", "--noheader", check=False).stdout, 20, "the end of all jobs")
        daemons = [self.daemon(name) for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES), "munged")]
        for pid in filter(None, daemons):
            os.kill(pid, signal.SIGTERM)
        for pid in filter(None, daemons):
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20, f"the end of daemon {pid}")
        shutil.rmtree(self.base, ignore_errors=True)

    def call(self, *line: str, check: bool = True, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
        """A program of Slurm's, or one that submits."""
        environment = {**self.environment, **options.pop("env", {})}
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=timeout, env=environment, check=False, **options
        )
        assert not check or done.returncode == 0, (line, done.stdout, done.stderr)
        return done

    def log(self) -> str:
        return "".join(path.read_text()[-2000:] for path in sorted(self.base.glob("slurm*.log")))


@dataclass(frozen=True)
class Job:
    """A submitted job whose run keeps its logs in ``logs``."""

    cluster: Cluster
    number: str
    logs: Path

    def show(self, name: str) -> str:
        said = self.cluster.call("scontrol", "show", "job", self.number).stdout
        return re.findall(rf"\b{name}=(\S+)", said)[0]

    @property
    def state(self) -> str:
        return self.show("JobState")

    @property
    def status(self) -> int:
        """What its script left with."""
        return int(self.show("ExitCode").partition(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.show("Restarts"))

    def wait(self, seconds: float) -> str:
        """Its state once it has ended for good."""
        try:
            wait_for(lambda: self.state in ENDED, seconds, f"the end of job {self.number}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.state}\n{self.text()[-3000:]}\n{self.cluster.log()}") from None
        return self.state

    def text(self, rank: int | None = None) -> str:
        path = self.logs / f"{self.number}{'' if rank is None else f'.rank{rank}'}.log"
        return path.read_text() if path.exists() else ""

    @property
    def last_line(self) -> str:
        return self.text().splitlines()[-1]

    def ready(self, ranks: int = 2) -> None:
        """Wait until so many ranks of a stub have said that they listen."""
        wait_for(lambda: len(list(self.logs.parent.glob("ready.*"))) == ranks, 40, f"{ranks} ranks of {self.number}")

    def processes(self) -> list[int]:
        return processes_with(f"SLURM_JOB_ID={self.number}")

    def rank(self, number: int) -> int:
        """The process of a rank, itself."""
        ranks = set(self.processes()) & set(processes_with(f"RANK={number}"))
        line = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ranks}
        return next(
            pid for pid in sorted(ranks) if b"megatron_tide.distill" in line[pid] and b"rank.sh" not in line[pid]
        )
