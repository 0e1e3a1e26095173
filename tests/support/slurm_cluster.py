"""A real SLURM of two virtual nodes on this machine, as root, for as long as a test needs it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Names that resolve; nodes differ by their ports.
NODES = ("127.0.0.1", "127.0.0.2")
GPUS = 2  # of a node, made of /dev/null
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {size}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {size}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed; also says so of a user who is not root."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return lacking if os.geteuid() == 0 else [*lacking, "root"]


class Cluster:
    """Daemons under a folder; `environment` makes SLURM's commands talk to them."""

    def __init__(self, root: Path):
        self.root = root
        self.daemons: dict[str, subprocess.Popen] = {}
        root.mkdir(exist_ok=True)
        here = Path(__file__).parent / "slurm_bin"  # what nemo-run needs of accounting
        path = f"{here}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": path}
        for name in [n for n in self.environment if n.startswith(("SLURM_J", "SLURM_P", "RANK"))]:
            del self.environment[name]

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        for index in range(GPUS):
            os.mknod(self.root / f"gpu{index}", 0o20666, os.makedev(1, 3))
        size = f"CPUs=8 RealMemory=65536 Gres=gpu:{GPUS} State=UNKNOWN"
        text = CONFIGURATION.format(
            root=self.root, host=host, ports=free_ports(3), nodes=NODES, size=size
        )
        (self.root / "slurm.conf").write_text(text)
        gres = f"Name=gpu File={self.root}/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
        (self.root / "gres.conf").write_text(gres)
        (self.root / "state").mkdir()
        self.spawn("slurmctld", "-D", "-c")
        for node in NODES:
            (self.root / f"spool.{node}").mkdir()
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node's daemon and wait until it has nothing to do."""
        self.spawn(f"slurmd.{node}", "-D", "-N", node)
        idle = ["sinfo", "-h", "-N", "-n", node, "-o", "%T"]
        wait_until(
            lambda: output(self.environment, *idle).startswith("idle"), 60, f"{node} to be idle"
        )

    def kill_node(self, node: str) -> None:
        """End a node's daemon and all that runs there, as a power cut would."""
        daemon = self.daemons.pop(f"slurmd.{node}")
        tasks = self.processes(SLURMD_NODENAME=node)
        parents = {int(parent) for pid in tasks if (parent := stat(pid, "PPid"))}
        steps = [pid for pid in parents if stat(pid, "Name").startswith("slurmstepd")]
        kill(daemon.pid, *steps, *tasks)
        daemon.wait()

    def processes(self, **variables: str) -> list[int]:
        """Processes of jobs whose environment has these variables."""
        wanted = {f"{name}={value}" for name, value in variables.items()}
        wanted.add(f"SLURM_CONF={self.environment['SLURM_CONF']}")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            if wanted <= set(words):
                found.append(int(folder.name))
        return found

    def spawn(self, name: str, *flags: str) -> None:
        with (self.root / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [name.split(".")[0], *flags],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        subprocess.run(["scancel", "-f", "-u", "root"], env=self.environment)
        try:
            wait_until(lambda: not output(self.environment, "squeue", "-h").strip(), 15, "no jobs")
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.terminate()
            for daemon in self.daemons.values():
                daemon.wait(20)

    def run(self, *command: object, **environment: str) -> str:
        """Run a command beside the cluster; its output."""
        return output(self.environment | environment, *map(str, command))

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        text = self.run("scontrol", "show", "job", "-o", job).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, seconds: float = 300) -> str:
        """Wait for a job's end; its final state."""
        wait_until(lambda: self.job(job)["JobState"] in FINAL, seconds, f"job {job}")
        return self.job(job)["JobState"]


def kill(*pids: int) -> None:
    """End processes at once; one may have ended by itself, as a shell whose child is killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stat(pid: int, field: str) -> str:
    """A line of what the system says of a process; empty where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def output(environment: dict[str, str], *command: str) -> str:
    """Output of a command; what it printed is shown if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def wait_until(true, seconds: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.3)  # most questions start a program of SLURM's
