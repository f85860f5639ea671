"""A real SLURM of two nodes on this machine: one munged, one slurmctld, two slurmd, all in a folder of their own.

Needs the Debian packages slurm-wlm and munge; touches neither /etc nor a SLURM that already runs here. Every client
command finds this cluster by SLURM_CONF, which `Cluster.env` sets.
"""

import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # Debian keeps the daemons there
NODES = ("n1", "n2")
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # the daemons do not outlive a test run that is killed


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll `condition` until it holds; AssertionError naming `what` when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.2)


class Cluster:
    """Start with `start`, end with `stop`, which ends the jobs and the four daemons that this object started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o711)  # munge wants its socket within everybody's reach
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._config())
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                     f"--key-file={key}", f"--pid-file={self.folder}/munge.pid",
                     f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log")  # fmt: skip
        wait_until((self.folder / "munge.socket").exists, 10, "munged's socket")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "two idle nodes")

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def stop_node(self, node: str) -> None:
        """Kill this node's slurmd, as a crash would: what runs on the node goes on unattended."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        if (self.folder / "slurm.conf").exists() and "slurmctld" in self.daemons:
            self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), 60, "the end of all jobs")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def run(self, *command: str, check: bool = True, **options) -> str:
        """A client command's standard output."""
        done = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=60, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        return dict(part.partition("=")[::2] for part in self.run("scontrol", "-o", "show", "job", number).split())

    def wait_for_end(self, number: str, seconds: float) -> dict[str, str]:
        """Wait until the job is over; returns its last record."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(number)["JobState"] in over, seconds, f"the end of job {number}")
        return self.job(number)

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments], env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip

    def _config(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
            for node, port in zip(NODES, ports, strict=True)
        )
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire before it starts again: 120 s unless told otherwise.
AuthInfo=socket={self.folder}/munge.socket,cred_expire=8
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
# The nodes' CPUs are what this file says, whatever the machine has.
SlurmdParameters=config_overrides
# A node whose slurmd is silent for so long is down, and its jobs are requeued (300 s by default).
SlurmdTimeout=15
MessageTimeout=60
KillWait=20
ReturnToService=2
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
