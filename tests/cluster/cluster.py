"""A Slurm cluster of two nodes on the loopback address of this machine, which lives as long as a test."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2")


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait until a condition holds; raise TimeoutError with the message of ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s: {what()}")
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


class Cluster:
    """Runs the daemons of Slurm as children of this process; they end with it.

    Args:
        folder: holds configuration, keys, state, logs and job outputs. The path must be short, since it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen]()
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] += ":/usr/sbin"
        template = (Path(__file__).parent / "slurm.conf").read_text()
        host = socket.gethostname().split(".")[0]
        values = {"folder": folder, "host": host, "user": getpass.getuser(), "ports": free_ports(3)}
        (folder / "slurm.conf").write_text(template.format(**values))
        (folder / "state").mkdir()

    def start(self) -> None:
        """Start munge, the controller and two nodes, and wait until both are idle."""
        key, munge = self.folder / "munge.key", self.folder / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={munge}.{name}" for name in ("pid", "log", "seed")]
        # --force: the folder is closed to other users, who are not to use this cluster
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}.socket", *files)
        wait_for((self.folder / "munge.socket").exists, 30, lambda: "munged has not started")
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        wait_for(lambda: self.states() == ["idle"] * 2, 120, lambda: f"nodes are {self.states()}, see {self.folder}")

    def daemon(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=self.environment["PATH"])
        assert path is not None, f"there is no {program}: make test-cluster installs it"
        with (self.folder / f"{program}.{len(self.daemons)}.output").open("w") as output:
            command = ["setpriv", "--pdeathsig", "TERM", path, *arguments]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))

    def stop(self) -> None:
        """End all jobs, all daemons and every process that they started."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 45
        while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            os.kill(process, signal.SIGKILL)

    def call(self, *command: str, check: bool = True) -> str:
        """Run a program of Slurm and return its output."""
        result = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def states(self) -> list[str]:
        return self.call("sinfo", "--Node", "--noheader", "--partition=usual", "--format=%T", check=False).split()

    def processes(self, **variables: str) -> list[int]:
        """Return the processes of this cluster whose environment has these variables, youngest last."""
        wanted = {
            f"{name}={value}" for name, value in {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}.items()
        }
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = set(path.read_text(errors="replace").split("\0"))
            except OSError:
                continue  # it has ended, or is another user's
            if wanted <= environment and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        return sorted(found)
